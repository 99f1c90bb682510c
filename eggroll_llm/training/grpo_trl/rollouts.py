"""What a step of GRPO samples, and the weights that it samples from: an engine in the place of TRL's vLLM."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from eggroll_llm.config.schema import RunConfig
from eggroll_llm.engine.interface import Decoding, Engine, Progress
from eggroll_llm.engine.sampling import OnRollout, Rollout, sample_population, sampling_seed
from eggroll_llm.errors import TrainingError
from eggroll_llm.es.weight_change import UpdateReport, sampled_rows, update_report
from eggroll_llm.models.targets import is_trained

_ADAPTED = ".base_layer."  # what peft puts into the name of a weight that has an adapter


class Rollouts:
    """Takes the place of TRL's `VLLMGeneration`."""

    def __init__(
        self,
        engine: Engine,
        config: RunConfig,
        decoding: Decoding,
        on_progress: Progress,
        on_begin: Callable[[], OnRollout],
    ) -> None:
        """`on_begin` is called before a step is sampled, and what it returns with each rollout."""
        self._engine, self._config, self._on_begin = engine, config, on_begin
        self._decoding, self._on_progress = dataclasses.replace(decoding, logprobs=True), on_progress
        self.model: Any = None
        """The model in training, set by its trainer."""
        self.step = 0
        """Step of the run, set before it samples: sampling depends on nothing but seed and step."""
        self.last: list[Rollout] = []
        """What the last call of `generate` returned, in order."""
        self.sampling_seconds = self.sync_seconds = 0.0
        """Spent since they were set to 0."""
        self.report: UpdateReport | None = None
        """How far the weights moved between the last two times that they were served."""
        self._rows: list[torch.Tensor] = []

    def sync_weights(self) -> None:
        """Serve the weights of the model in training, rounded to the engine's format.

        Raises TrainingError, with the old ones served on, when there is a weight that is not finite.
        """
        start = time.perf_counter()
        weights = checkpoint_tensors(self.model)
        sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in weights.values()])
        if lost := [name for name, finite in zip(weights, sums.isfinite().tolist(), strict=True) if not finite]:
            raise TrainingError(
                f"step {self.step}: {len(lost)} tensors are not finite any more, first {lost[0]}: start a new run with "
                "a lower grpo.learning_rate"
            )
        rows = sampled_rows([tensor.detach() for name, tensor in weights.items() if is_trained(name)])
        self.report = update_report(self._rows, rows, self._engine.dtype) if self._rows else None
        self._rows = rows
        self._engine.load_weights(weights)
        self.sync_seconds += time.perf_counter() - start

    def generate(
        self, prompts: Sequence[Sequence[int]], images: Any, num_generations: int, profiler: Any = None
    ) -> tuple[Any, list[list[int]], list[list[list[float]]], None]:
        """Answer prompts, each of which comes `num_generations` times in a row.

        Returns:
            The prompts, and per completion its tokens and, in a list of one, the log-probability of each.
        """
        start = time.perf_counter()
        self.last = sample_population(
            self._engine,
            [tuple(ids) for ids in prompts[::num_generations]],
            (None,),
            num_generations,
            self._decoding,
            seed=self._config.seed,
            step=self.step,
            on_progress=self._on_progress,
            on_rollout=self._on_begin(),
        )
        # TRL shuffles completions with "bnpo" before it cuts them into micro batches; vLLM has moved the generator.
        torch.manual_seed(sampling_seed(self._config.seed, self.step, len(prompts), 0))
        self.sampling_seconds += time.perf_counter() - start
        completions = [rollout.completion for rollout in self.last]
        ids = [list(completion.token_ids) for completion in completions]
        return prompts, ids, [[[logprob] for logprob in c.logprobs] for c in completions], None


def checkpoint_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return every weight by name: views of the model's own, but where it has an adapter W + (alpha / r) B A, a copy.

    Merging in place, as peft does it, and taking the adapter out again would leave a rounding error in W every time.
    """
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    tensors = {
        name.replace(_ADAPTED, "."): tensor for name, tensor in inner.state_dict().items() if ".lora_" not in name
    }
    for name, module in inner.named_modules():
        if hasattr(module, "get_delta_weight"):
            for adapter in module.active_adapters:
                tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + module.get_delta_weight(adapter).detach()
    return tensors
