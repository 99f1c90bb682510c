"""Evolution strategies for any torch module: the noise, fitness, update and journal of a run on vLLM, without vLLM.

    es = ES(policy, population=64, sigma=0.1, lr=0.03)
    for _ in range(50):
        with es.ask():                # inside, row i of a batch goes through the weights of member i
            fitness = evaluate(policy)
        es.tell(fitness)              # of the whole population; maximised

A step's noise is a function of (seed, step, member, parameter): members may be asked for in any parts, in any order and
by any process, and processes that are told the same fitness have the same weights, to the bit. What a member computes
depends on its batch in the last place, as with any torch module: fitness is what processes exchange.

In full rank (`rank=None`) E is standard normal, from the same generator: OpenES, the baseline.

Shapes: M member, O out features, I in features, R rank.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eggroll_llm.errors import JournalError, ModelError, PopulationError
from eggroll_llm.es.estimate import UpdateSpec, check_finite
from eggroll_llm.es.fitness import FitnessMethod, shape_fitness
from eggroll_llm.es.masters import MasterWeights
from eggroll_llm.es.noise import shape_of
from eggroll_llm.es.plan import StepPlan, plan_step
from eggroll_llm.es.weight_change import UpdateReport
from eggroll_llm.kernels.fold import fold_for
from eggroll_llm.kernels.noise import RowLayout, served_factors_of
from eggroll_llm.module.layers import Buffers, find_layers, rest_of, same_tensors, version_of
from eggroll_llm.module.members import MATRICES, Members, forward_of
from eggroll_llm.module.settings import checked_settings, settings_hash
from eggroll_llm.records.journal import Journal, JournalEntry, JournalHeader, check_same_run, read_journal
from eggroll_llm.records.updates import CHECKSUM_EVERY, check_weights, journal_entry, recorded_update


class ES:
    """An evolution strategy over the parameters of a module that want a gradient, in place."""

    def __init__(
        self,
        module: nn.Module,
        *,
        population: int,
        sigma: float,
        lr: float,
        rank: int | None = 1,
        seed: int = 0,
        fitness: FitnessMethod = "centered",
        steps: int = 0,
        journal: Path | str | None = None,
        **settings: Any,
    ) -> None:
        """Start from the module's weights, or after the last step of the journal where there is one.

        Linear layers, embeddings, LayerNorm and RMSNorm are trained, unless frozen by `requires_grad_(False)`. `lr` is
        the root-mean-square change of a weight in a step of SGD, and `rank` that of a matrix's perturbation, None for
        full. `steps` is the length of schedules. `settings` are fields of `EsSettings` (`settings.OTHERS`), such as
        optimizer="adam". With an existing journal, the module must hold the weights that the journal began with, frozen
        ones and buffers included.

        Raises ConfigError for settings, ModelError for the module and JournalError for the journal.
        """
        self.module, self.population, self.step = module, population, 0
        self._seed, self._steps = seed, steps
        self._settings = checked_settings(
            settings,
            seed=seed,
            steps=steps,
            population=population,
            sigma=sigma,
            learning_rate=lr,
            rank=1 if rank is None else rank,
            fitness=fitness,
        )
        self._layers = find_layers(module)
        self._parameters = {
            name: layer.module.get_parameter(attribute)
            for layer in self._layers
            for attribute, name in layer.trained.items()
        }
        matrices = {layer.trained.get("weight") for layer in self._layers if type(layer.module) in MATRICES}
        low_rank = set() if rank is None else matrices  # in full rank, a matrix is a vector to the method
        self._full_rank = {
            name: parameter.shape for name, parameter in self._parameters.items() if name in matrices - low_rank
        }
        weights = {
            name: parameter.detach() if name in low_rank else parameter.detach().flatten()
            for name, parameter in self._parameters.items()
        }
        first = next(iter(weights.values()))
        self._dtype, self._device = first.dtype, first.device
        try:
            self._masters = MasterWeights(weights, self._settings, self._dtype, fold_for(self._device))
        except ValueError as error:
            raise ModelError(str(error)) from error
        shapes = tuple(shape_of(name, weight.shape) for name, weight in weights.items())
        self._layout = RowLayout(shapes, self._settings.rank)
        self._members: Members | None = None
        self._updating = False
        self._asked, self._uncalled = False, {layer.name for layer in self._layers}
        self._written = self._states()
        scheduled = {self._settings.sigma_schedule, self._settings.learning_rate_schedule} != {"constant"}
        frozen_hash = settings_hash(self._settings, seed=seed, full=rank is None, steps=steps if scheduled else 0)
        base_model = " ".join(["module", self.checksum(), *rest_of(module, self._parameters)])
        self._header = JournalHeader(frozen_hash=frozen_hash, base_model=base_model)
        self._journal = None if journal is None else Journal.open(Path(journal), self._header)
        if self._journal:
            if self._journal.dropped_tail:
                warnings.warn(self._journal.dropped_tail, stacklevel=2)
            try:
                self._replay(self._journal.path, self._journal.entries)
            except BaseException:
                self._journal.close()
                raise

    def members(self) -> Tensor:
        """Return the numbers of all members, int64 [population], to be split and handed out."""
        return torch.arange(self.population)

    @contextmanager
    def ask(self, members: Tensor | Sequence[int] | None = None) -> Iterator[Tensor]:
        """Let the module compute as members, all by default: inside, row i of every batch is that of the i-th.

        A batch is [members, ..., features]; a member that is named several times has several rows. There are no
        gradients inside. Outside, the module computes with its own weights, the mean of the population.

        Raises PopulationError for members that do not exist, for a batch of other rows and when the module is not
        called, and ModelError when a buffer of the module changes or its weights did since the last step.
        """
        self._check_outside("ask")
        self._check_weights("ask")
        members_N = self._checked_members(self.members() if members is None else members)
        buffers = Buffers(self.module)
        self._members = asked = self._of(members_N)
        try:
            with torch.no_grad():
                for layer in self._layers:
                    layer.module.forward = forward_of(layer, self._members)
                yield members_N
        finally:
            self._members = None
            for layer in self._layers:
                vars(layer.module).pop("forward", None)
        buffers.check()
        if not asked.called:
            raise PopulationError(
                f"ask(): no layer of this {type(self.module).__name__} was called inside: evaluate there the very "
                "module that ES was given"
            )
        self._asked = True
        self._uncalled -= asked.called

    def tell(self, fitness: Tensor | Sequence[float]) -> UpdateReport:
        """Update the module with what each member has earned, [population] or [population, problems], to be maximised.

        It is in the journal, on disk, before it is applied. Raises PopulationError for fitness of another length or
        that is not finite, and for a layer that no member has called, ModelError when the module's weights are not
        those of the last step, and JournalError when the journal cannot be written; nothing has changed then.
        """
        self._check_outside("tell")
        self._check_weights("tell")
        if self._asked and self._uncalled:
            raise PopulationError(
                f"layer {min(self._uncalled)!r} was not called inside ask(), so noise alone would move its weights: "
                "freeze it with requires_grad_(False), or call it as a module"
            )
        shaped = shape_fitness(
            self._checked_fitness(fitness), self._settings.fitness, antithetic=self._settings.antithetic
        )
        update = UpdateSpec.of(self._plan(), shaped.fitness_M.tolist())
        check_finite(update)
        if self._journal:
            checksum = self.checksum() if self.step % CHECKSUM_EVERY == 0 else ""
            self._journal.append(journal_entry(update, checksum=checksum))
        return self._apply(update)

    def factors(self, name: str, members: Tensor | Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return A_MOR and B_MIR of a parameter for members of this step, for code of your own.

        Member m computes with `weight + (A[m] @ B[m].T).view(weight.shape)`: sign, sigma and 1 / sqrt(r) are in A. For
        a vector, and in full rank, O is the number of values and B is 1; of a bfloat16 vector they are float32. Raises
        PopulationError.
        """
        if name not in self._parameters:
            raise PopulationError(f"parameter {name!r}: is none of those trained, {', '.join(self._parameters)}")
        found = self._of(self._checked_members(self.members() if members is None else members))
        if name not in found.factors:
            if name in found.matrices:
                E_MO = found.matrices[name].flatten(1)[found.pair_N] * found.sign_N[:, None]
            else:
                E_MO = found.vectors[name][found.slot_N]
            return E_MO[:, :, None], torch.ones_like(E_MO[:, :1, None])
        A_SV, B_SCRI = found.factors[name]
        return A_SV.unflatten(1, (self._layout.rank, -1)).mT[found.slot_N], B_SCRI[found.slot_N, 0].mT

    def checksum(self) -> str:
        """Return 16 hexadecimal digits that identify the bits of the trained weights."""
        return self._masters.checksum()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of float32 masters, optimizer state and step: `load_state_dict` continues there.

        Raises PopulationError after an update that was interrupted.
        """
        self._check_whole("state_dict")
        return {
            "settings": self._header.frozen_hash,
            "step": self.step,
            "weights": {key: value.clone() for key, value in self._masters.state().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, to the bit. Raises PopulationError, before any change.

        With a journal, the state must be that of its last step.
        """
        self._check_outside("load_state_dict")
        if state.keys() - {"settings"} != {"step", "weights"}:
            raise PopulationError(f"state with {', '.join(map(repr, state))}: is not from ES.state_dict()")
        if state.get("settings", self._header.frozen_hash) != self._header.frozen_hash:
            raise PopulationError("state of a run with other settings: make ES with those that it was saved with")
        if self._journal and self._journal.last_step != state["step"]:
            raise PopulationError(
                f"state of step {state['step']}: the journal {self._journal.path} ends at step "
                f"{self._journal.last_step}. Load a state of that step, or continue with another journal"
            )
        if self._journal and not same_tensors(self._masters.state(), state["weights"]):
            raise PopulationError(
                f"state of other weights than those of step {self.step} in the journal {self._journal.path}, which "
                "could not be rebuilt from it any more. Load it into an ES without this journal"
            )
        before, self._updating = self._updating, True
        try:
            self._masters.load_state(state["weights"])
        except ValueError as error:  # which comes before any change
            self._updating = before
            raise PopulationError(str(error)) from error
        self.step = state["step"]
        self._write()
        self._updating = False

    def replay(self, journal: Path | str, step: int | None = None) -> None:
        """Apply the updates of a journal from this step on to another, by default its last: no fitness is needed.

        Raises JournalError when the journal is damaged, does not reach that far or belongs to other settings or
        weights; the steps before are applied then. Raises it before any change when ES has a journal of its own that
        ends at another step: that journal would lack the steps between.
        """
        self._check_outside("replay")
        self._check_whole("replay")
        contents = read_journal(Path(journal))
        if contents.header is None:
            raise JournalError(f"{journal}: is empty. Name the journal of a run")
        check_same_run(Path(journal), contents.header, self._header)
        last = len(contents.entries)
        to = last if step is None else step
        if not self.step <= to <= last:
            raise JournalError(f"{journal}: ends at step {last}, ES is at {self.step}: replay to a step in between")
        if self._journal and self._journal.last_step != to:
            raise JournalError(
                f"replay to step {to}: the journal of this ES, {self._journal.path}, ends at step "
                f"{self._journal.last_step} and would lack the steps between. Replay with an ES without a journal, or "
                f"continue with journal={str(journal)!r}"
            )
        self._replay(Path(journal), contents.entries[self.step : to])

    def close(self) -> None:
        """Close the journal; a second call does nothing."""
        if self._journal:
            self._journal.close()

    def _plan(self) -> StepPlan:
        return plan_step(self._settings, seed=self._seed, step=self.step + 1, steps=self._steps)

    def _of(self, members_N: Tensor) -> Members:
        return Members(
            members_N,
            self._plan().noise,
            self._layout,
            self._full_rank,
            antithetic=self._settings.antithetic,
            dtype=self._dtype,
            device=self._device,
        )

    def _replay(self, path: Path, entries: Iterable[JournalEntry]) -> None:
        for entry in entries:
            check_weights(path, entry, self.checksum)
            self._apply(recorded_update(self._plan(), entry))

    def _apply(self, update: UpdateSpec) -> UpdateReport:
        self._updating = True
        report = self._masters.apply(update, served_factors_of)
        self.step = update.step
        self._write()
        self._updating = False
        return report

    @torch.no_grad()
    def _write(self) -> None:
        """Give the module the rounding of the masters."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._masters.served(name).view(parameter.shape))
        self._written = self._states()

    def _states(self) -> dict[str, tuple[Any, ...]]:
        """Return what tells whether somebody else has written to a parameter, moved it or put another in its place."""
        found = {}
        for layer in self._layers:
            for attribute, name in layer.trained.items():
                parameter = layer.module.get_parameter(attribute)
                found[name] = id(parameter), parameter.data_ptr(), version_of(parameter), parameter.dtype
        return found

    def _check_weights(self, what: str) -> None:
        self._check_whole(what)
        now = self._states()
        if changed := [name for name in now if now[name] != self._written[name]]:
            raise ModelError(
                f"{what}(): parameter {changed[0]!r} was changed, moved or replaced since the last step, and ES would "
                "overwrite it: load weights and move the module before ES is made"
            )

    def _check_whole(self, what: str) -> None:
        if self._updating:
            raise PopulationError(
                f"{what}(): an update after step {self.step} was interrupted, and some weights have moved already: "
                "load a state_dict, or make the module and ES anew, with the journal if there is one"
            )

    def _check_outside(self, what: str) -> None:
        if self._members is not None:
            raise PopulationError(
                f"{what}() inside ask(), where the module computes as members: call it after the block"
            )

    def _checked_members(self, members: Tensor | Sequence[int]) -> Tensor:
        members_N = torch.as_tensor(members).cpu()
        if members_N.ndim != 1 or not len(members_N) or members_N.is_floating_point() or members_N.dtype == torch.bool:
            raise PopulationError(f"members {members!r}: must be a list of whole numbers, such as es.members()")
        if members_N.min() < 0 or members_N.max() >= self.population:
            first, last = int(members_N.min()), int(members_N.max())
            raise PopulationError(f"members from {first} to {last}: must be from 0 to {self.population - 1}")
        return members_N.long()

    def _checked_fitness(self, fitness: Tensor | Sequence[float]) -> Tensor:
        fitness_M = fitness if isinstance(fitness, Tensor) else torch.as_tensor(fitness, dtype=torch.float64)
        fitness_M = fitness_M.detach().cpu()
        if fitness_M.ndim not in (1, 2) or len(fitness_M) != self.population or not fitness_M.numel():
            raise PopulationError(
                f"fitness of shape {[*fitness_M.shape]}: must be [{self.population}], a number for each member, or "
                f"[{self.population}, problems]. Join the parts of several processes in the order of the members"
            )
        fitness_MP = fitness_M.view(self.population, -1)
        if bad := (~fitness_MP.isfinite().all(1)).nonzero().flatten().tolist():
            raise PopulationError(
                f"fitness of member {bad[0]} is not finite, one of {len(bad)}: give such members the worst that they "
                "can earn"
            )
        return fitness_MP
