"""The inference engine: one vLLM instance in this process that serves the base model and every member of a population.

Requests of members and of the base model may share a batch. Nothing is written to disk while sampling: a member is
(seed, step, pair, sign), and its factors are written into vLLM's adapter slots in memory.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import EngineArgs
from vllm.model_executor.models import registry
from vllm.v1.engine.llm_engine import LLMEngine

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.interface import Completion, Decoding, Request, Scored, Stream, UpdateTimes
from eggroll_llm.engine.sampling import in_order
from eggroll_llm.engine.token_tree import trees_of
from eggroll_llm.engine.vllm.arguments import engine_args
from eggroll_llm.engine.vllm.failures import Refused, call_error, calling, start_error
from eggroll_llm.engine.vllm.ranks import environment
from eggroll_llm.engine.vllm.requests import RequestQueue
from eggroll_llm.engine.vllm.text import TextRules, completion, sampling_params
from eggroll_llm.engine.watchdog import Watchdog
from eggroll_llm.errors import ModelError, UserError
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.es.weight_change import united
from eggroll_llm.models.architectures import check_tensor_parallel
from eggroll_llm.models.export import export_model
from eggroll_llm.models.files import read_config
from eggroll_llm.models.targets import trained_parameters
from eggroll_llm.system.hardware import serves_on_cpu

log = logging.getLogger(__name__)

BATCH = 1 << 26
"""Elements of tensors that leave or enter vLLM's processes at once, at most: 256 MiB of float32 masters."""


class VllmEngine:
    """vLLM with a population inside. Only one may be alive in a process.

    What vLLM raises in a call becomes an EngineError. A call that hangs ends the process (`watchdog`).
    """

    def __init__(
        self,
        model_dir: Path,
        config: EngineConfig,
        es: EsSettings | None = None,
        *,
        prefix_caching: bool = True,
        stock: bool = False,
        logprobs: bool = False,
        thinking: bool = False,
        vllm_args: Mapping[str, Any] | None = None,
    ) -> None:
        """Start vLLM on a checked model directory, with slots, sequences and context of `config` settled.

        Without `es` there are no float32 masters, members have rank 1, and only `generate`, `stream` and `load_weights`
        may be called. `stock` leaves a CPU to vLLM's own adapter arithmetic, for comparison. With `logprobs` decoding
        may ask for them, which costs a softmax per token; with `thinking` it may limit thoughts, which takes the tokens
        of every step to the processor before the next. `vllm_args` replace arguments of vLLM, such as `load_format`,
        for measurements.
        Raises ModelError when the model cannot be adapted, ConfigError when memory is short, else EngineError.
        """
        if 0 in (config.slots, config.max_sequences, config.max_model_len):
            raise ValueError("slots, max_sequences and max_model_len of an engine must be settled")
        check_tensor_parallel(read_config(model_dir), config.tensor_parallel, model_dir)
        self.model_dir, self._config, self._thinking = model_dir, config, thinking
        self._threads_before = torch.get_num_threads()
        if config.threads:
            torch.set_num_threads(config.threads)
        self.watchdog = Watchdog(config.timeout_seconds)
        ways = {"prefix_caching": prefix_caching, "stock": stock, "logprobs": logprobs, "thinking": thinking}
        args = dataclasses.replace(engine_args(model_dir, config, es, **ways), **(vllm_args or {}))
        self.dtype: torch.dtype = args.dtype
        self._batch_tokens = args.max_num_batched_tokens
        with contextlib.ExitStack() as failed:
            failed.callback(self.close)
            self._start(args)
            self.queue = RequestQueue(self._llm, self.watchdog, config)
            _check_shapes(model_dir, es.layers if es else (), self.shapes)
            if config.compile:  # which must not fall into the first step
                self.generate([Request(prompt_ids=(1, 2, 3))], Decoding(max_tokens=2))
            failed.pop_all()

    def _start(self, args: EngineArgs) -> None:
        set_num_threads = torch.set_num_threads
        try:
            with self.watchdog, environment(self._config), _inspected_here(self._in_process):
                self._llm = LLMEngine.from_engine_args(args)
                self.text_rules = TextRules(self._llm.get_tokenizer())
                started, *_ = self._llm.collective_rpc("es_call", args=("start",))
        except UserError:
            raise
        except Exception as error:
            raise start_error(error, self.model_dir, self._config) from error
        finally:  # vLLM puts a function that does nothing in its place, for all engines to come and for the user
            torch.set_num_threads = set_num_threads
        self.shapes: dict[str, tuple[int, int]] = started.shapes
        self.own_sampler: bool = started.own_sampler

    def begin(self, noise: NoiseSpec, population: int, *, antithetic: bool = True) -> float:
        """Make the members of a step available; return the seconds that their noise took."""
        self.queue.name_members(noise)
        return float(max(self._call_all("begin", noise, population, antithetic)))

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Completion]:
        """Return the completion of each request, in their order; they are matched by id, never by position.

        Raises EngineError when the engine does not answer every request.
        """
        return in_order(self.stream(requests, decoding), len(requests))

    def stream(self, requests: Sequence[Request], decoding: Decoding) -> Stream:
        """Yield (position of the request, completion) as they finish; closing it early leaves the engine usable.

        Raises EngineError when the engine does not answer every request.
        """
        self.submit(dict(enumerate(requests)), decoding)
        yield from self.queue.drain()

    def submit(self, requests: Mapping[int, Request], decoding: Decoding) -> None:
        """Take requests, by keys that are not in use; `poll` answers them."""
        assert not decoding.thinking_token_budget or self._thinking
        params = sampling_params(decoding, self.text_rules, own_sampler=self.own_sampler)
        self.queue.add(requests, params, lambda output: completion(output, decoding, self.text_rules))

    def poll(self) -> list[tuple[int, Completion]]:
        """Compute one step with what was submitted; return (key, completion) of what it finished."""
        return self.queue.poll()

    def abort(self) -> None:
        """Forget whatever was submitted and is not answered."""
        self.queue.abort()

    def score(self, completions: Sequence[Scored], members: Sequence[int | None], temperature: float = 1.0) -> Tensor:
        """Return the log-probabilities [members, tokens], float32, of the tokens of all completions, in order.

        Raises ValueError for a completion that does not fit the context, ModelError for attention that is not known.
        """
        passes = self.scoring(completions, members, temperature)
        while True:
            try:
                next(passes)
            except StopIteration as end:
                return end.value

    def scoring(
        self, completions: Sequence[Scored], members: Sequence[int | None], temperature: float = 1.0
    ) -> Generator[None, None, Tensor]:
        """Yield after each forward pass, of no more tokens than a step of `poll` has; return what `score` does."""
        longest = max(len(prompt) + len(completion) for prompt, completion in completions)
        if longest > self._config.max_model_len:
            raise ValueError(
                f"a completion and its prompt have {longest} tokens, more than the context's "
                f"{self._config.max_model_len}"
            )
        numbers = [-1 if member is None else member for member in members]
        columns = []
        for _, tree in trees_of(completions, self._batch_tokens):
            rows = []
            for part in _parts(numbers, self._config.slots, max(1, self._batch_tokens // len(tree))):
                rows.append(self._call("score", tree, part, temperature))
                yield
            columns.append(torch.cat(rows))
        return torch.cat(columns, dim=1)

    def update(self, spec: UpdateSpec) -> UpdateTimes:
        """Fold a step's fitness into the weights and serve them. Raises NonFiniteUpdate with nothing changed."""
        times: list[UpdateTimes] = self._call_all("update", spec)
        start = time.perf_counter()
        self._forget_prefixes()
        slowest = max(times, key=lambda each: each.update + each.serve)
        return UpdateTimes(
            report=united([each.report for each in times]),
            update=slowest.update,
            serve=slowest.serve + time.perf_counter() - start,
        )

    def replay(self, specs: Sequence[UpdateSpec]) -> None:
        """Apply recorded updates without sampling."""
        self._call("replay", list(specs))
        self._forget_prefixes()

    def export(self, directory: Path) -> None:
        """Write the served model as a Hugging Face directory."""
        weights: dict[str, Tensor] = {}
        for names in self._names():
            weights |= self._call("served_weights", names)
        export_model(self.model_dir, directory, weights, self.dtype)

    def checksum(self) -> str:
        """Return a short hash of the served weights."""
        return str(self._call("checksum"))

    def state(self) -> dict[str, Tensor]:
        """Return float32 masters and optimizer state."""
        state: dict[str, Tensor] = {}
        for names in self._names():
            state |= self._call("state", names)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned, exactly."""
        for keys in _batches({key: tensor.numel() for key, tensor in state.items()}):
            self._call("take_state", {key: state[key] for key in keys})
        self._call("load_state")
        self._forget_prefixes()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Serve other weights: all of the checkpoint's tensors by name, of any floating-point format.

        Raises ModelError when names or shapes are not those that vLLM serves. Not for an engine with masters: an update
        would come back to them.
        """
        self._call("load_weights", dict(weights))
        self._forget_prefixes()

    def metrics(self) -> dict[str, float]:
        """Return nothing: the row of a step has it all."""
        return {}

    def close(self) -> None:
        """Shut vLLM down and free its memory. Raises nothing: what it may follow is more important."""
        torch.set_num_threads(self._threads_before)  # vLLM sets one beside a GPU
        if not hasattr(self, "_llm"):  # it did not start
            self.watchdog.close()
            return
        try:
            with self.watchdog:
                try:
                    if self._in_process:  # else it ends with its process
                        self._llm.collective_rpc("es_call", args=("release",))
                finally:
                    self._llm.engine_core.shutdown()
        except Exception as error:
            log.warning("%s", call_error("shutting down", error))
        finally:
            self.watchdog.close()

    @property
    def _in_process(self) -> bool:
        return self._config.tensor_parallel == 1

    def _call(self, method: str, *args: Any) -> Any:
        """Call a method of the population on all ranks; return what the first one says."""
        return self._call_all(method, *args)[0]

    def _call_all(self, method: str, *args: Any) -> list[Any]:
        with calling(method, self._llm, self.watchdog):
            results = self._llm.collective_rpc("es_call", args=(method, *args))
            for result in results:
                if isinstance(result, Refused):
                    raise result.error
        return results

    def _names(self) -> Iterator[list[str]]:
        return _batches({name: out * inside for name, (out, inside) in self.shapes.items()})

    def _forget_prefixes(self) -> None:
        """The cached keys and values belong to the old weights."""
        with calling("reset_prefix_cache", self._llm, self.watchdog):
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("requests are still running")


@contextlib.contextmanager
def _inspected_here(in_process: bool) -> Iterator[None]:
    """Let vLLM look at a model's class in this process: one of its own for each takes ten seconds.

    It is to keep CUDA out of a process that forks others.
    """
    in_subprocess = registry._run_in_subprocess
    if in_process or serves_on_cpu():
        registry._run_in_subprocess = lambda inspect: inspect()
    try:
        yield
    finally:
        registry._run_in_subprocess = in_subprocess


def _parts(members: Sequence[int], slots: int, at_once: int) -> Iterator[list[int]]:
    """Yield members in parts of `at_once` with no more of them than slots; the base model, -1, needs none."""
    part: list[int] = []
    for member in members:
        if len(part) == at_once or (member >= 0 and sum(other >= 0 for other in part) == slots):
            yield part
            part = []
        part.append(member)
    yield part


def _batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Group the names of tensors of so many elements, so that few at a time pass from process to process."""
    batch: list[str] = []
    total = 0
    for name, size in sizes.items():
        if batch and total + size > BATCH:
            yield batch
            batch, total = [], 0
        batch.append(name)
        total += size
    if batch:
        yield batch


def _check_shapes(model_dir: Path, layers: Sequence[int], served: Mapping[str, tuple[int, int]]) -> None:
    """What vLLM serves must be what the checkpoint calls trained, or an update could not be exported or replayed."""
    stored = {name: (out, inside) for name, out, inside in trained_parameters(model_dir, layers)}
    for name in sorted(stored.keys() | served.keys()):
        if stored.get(name) != served.get(name):
            raise ModelError(
                f"{model_dir}: {name!r} is {stored.get(name)} in the checkpoint and {served.get(name)} in vLLM: "
                "this architecture cannot be trained yet; use a Llama- or Qwen-shaped model"
            )
