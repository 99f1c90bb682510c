"""What the benchmark compares: our engine, plain vLLM, and the other ways of evaluating a population with vLLM.

Each is started once and then run on a workload: prompts, dealt out to the members in turn, each with the number of
tokens to generate. No variant stops early or caches prefixes. What a method does between steps (writing adapters) or
members (swapping weights) counts as its noise; what falls between forward passes is in its sampling time (loading
adapters, swapping). Adapters are made from our own noise, which is fast; full-rank noise comes from torch.
"""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from vllm import EngineArgs, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.linear import LinearBase
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.interface import Request
from eggroll_llm.engine.vllm.engine import VllmEngine, memory_args
from eggroll_llm.engine.vllm.weights import forget_linear_weights, repack
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.kernels.noise import served_factors_of
from eggroll_llm.models.targets import TARGET_MODULES, trained_parameters
from eggroll_llm.system.hardware import resolve_dtype

RAM_DISK = Path("/dev/shm")
FILE_RANK = 8  # the rank buffer of the published code


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts in tokens, and how many tokens each is answered with."""

    prompts: Sequence[Sequence[int]]
    new_tokens: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one run. Sampling is what tokens per second are counted in; None is what a variant does not do."""

    sample: float
    noise: float | None = None
    update: float | None = None
    serve: float | None = None
    tokens: int | None = None
    """Prompt and new tokens, if not those of the whole workload."""


class Variant(Protocol):
    """Something that answers a workload, again and again."""

    def run(self, work: Workload, repeat: int) -> Times:
        """Answer all prompts; `repeat` counts from 0 and stands for a step of training."""
        ...


class Plain:
    """vLLM without anything of ours and without members."""

    def __init__(self, job: dict[str, Any], **more: Any) -> None:
        config = EngineConfig(**job["engine"])
        context = job["context"]
        self._llm = LLMEngine.from_engine_args(
            EngineArgs(
                model=job["model_dir"],
                dtype=getattr(torch, resolve_dtype(config.dtype)),
                max_model_len=context,
                max_num_seqs=config.max_sequences,
                max_num_batched_tokens=max(4096, context),
                enforce_eager=not job["compiled"],
                enable_prefix_caching=False,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                seed=0,
                **memory_args(config),
                **more,
            )
        )
        if "worker_extension_cls" not in more:
            self._llm.apply_model(forget_linear_weights)  # or its memory would be ours in part

    def run(self, work: Workload, repeat: int) -> Times:
        """Answer all prompts with the one model."""
        return Times(sample=self._generate(work, [None] * len(work.prompts)))

    def _generate(self, work: Workload, adapters: Sequence[LoRARequest | None]) -> float:
        start = time.perf_counter()
        for i, (prompt, new_tokens, adapter) in enumerate(zip(work.prompts, work.new_tokens, adapters, strict=True)):
            prompt_ids: Any = {"prompt_token_ids": list(prompt)}
            self._llm.add_request(f"{i}", prompt_ids, sampling_params(new_tokens), lora_request=adapter)
        while self._llm.has_unfinished_requests():
            self._llm.step()
        return time.perf_counter() - start


class Population:
    """Our engine. `stock` has our placing of members in memory and vLLM's adapter arithmetic."""

    def __init__(self, job: dict[str, Any], *, stock: bool = False) -> None:
        self.job = job
        self._engine = VllmEngine(
            Path(job["model_dir"]),
            EngineConfig(**{**job["engine"], "enforce_eager": not job["compiled"]}),
            slots=job["slots"],
            rank=job["rank"],
            max_model_len=job["context"],
            prefix_caching=False,
            stock=stock,
        )

    def run(self, work: Workload, repeat: int) -> Times:
        """Sample, then update with alternating fitness, which moves the weights as a real step does."""
        rank, sigma, population = self.job["rank"], self.job["sigma"], self.job["population"]
        noise = self._engine.begin(NoiseSpec(seed=0, step=repeat, rank=rank, sigma=sigma), population)
        members = members_of(work, population)
        requests = [Request(prompt_ids=tuple(p), member=m) for p, m in zip(work.prompts, members, strict=True)]
        params = {id(r): sampling_params(n) for r, n in zip(requests, work.new_tokens, strict=True)}
        start = time.perf_counter()
        self._engine._queue(
            dict(enumerate(requests)), lambda request: params[id(request)], lambda output: output.request_id
        )
        for _ in self._engine._drain():
            pass
        sample = time.perf_counter() - start
        times = self._engine.update(
            UpdateSpec(
                step=repeat,
                noise_step=repeat,
                seed=0,
                rank=rank,
                sigma=sigma,
                learning_rate=1e-6,
                fitness_M=(1.0, -1.0) * (population // 2),
            )
        )
        return Times(sample=sample, noise=noise, update=times.update, serve=times.serve)


class Files(Plain):
    """vLLM's adapters as the published code uses them: files in a RAM disk, written and loaded anew for each step."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        super().__init__(
            job,
            enable_lora=True,
            max_loras=job["slots"],
            max_lora_rank=FILE_RANK,
            lora_target_modules=list(TARGET_MODULES),
        )
        self._dtype = getattr(torch, resolve_dtype(job["engine"]["dtype"]))
        self._shapes = trained_parameters(Path(job["model_dir"]))
        self._next_id = 1

    def run(self, work: Workload, repeat: int) -> Times:
        """Write an adapter per member, then sample; loading them falls into sampling."""
        population = self.job["population"]
        root = RAM_DISK if RAM_DISK.is_dir() else None
        directory = Path(tempfile.mkdtemp(prefix="eggroll-bench-", dir=root))
        try:
            start = time.perf_counter()
            self._write(directory, NoiseSpec(seed=0, step=repeat, rank=self.job["rank"], sigma=self.job["sigma"]))
            noise = time.perf_counter() - start
            first, self._next_id = self._next_id, self._next_id + population
            adapters = [
                LoRARequest(f"{first + m}", first + m, str(directory / f"{m}")) for m in members_of(work, population)
            ]
            return Times(sample=self._generate(work, adapters), noise=noise)
        finally:
            shutil.rmtree(directory)

    def _write(self, directory: Path, noise: NoiseSpec) -> None:
        pairs = self.job["population"] // 2
        factors = served_factors_of(noise, torch.arange(pairs), self._shapes, self._dtype, "cpu")
        config = {"peft_type": "LORA", "r": noise.rank, "lora_alpha": noise.rank, "target_modules": TARGET_MODULES}
        for member in range(2 * pairs):
            tensors = {}
            for name, (A_KOR, B_KIR) in factors.items():
                layer = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{layer}.lora_A.weight"] = B_KIR[member // 2].T.contiguous()
                tensors[f"{layer}.lora_B.weight"] = A_KOR[member // 2] * (-1.0 if member % 2 else 1.0)
            folder = directory / f"{member}"
            folder.mkdir()
            (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
            save_file(tensors, folder / "adapter_model.safetensors")


class Swap(Plain):
    """One member after another with all its weights: full-rank noise is added, served, and the next one replaces it."""

    MEMBERS = 4  # that are measured, as each takes the same time

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        super().__init__(job, worker_extension_cls=f"{__name__}.SwapExtension")
        self._llm.collective_rpc("swap_start")

    def run(self, work: Workload, repeat: int) -> Times:
        """Swap and sample the first members; swapping is their noise, and counted in sampling too."""
        per_member = len(work.prompts) // self.job["population"]
        noise = sample = 0.0
        for member in range(self.MEMBERS):
            start = time.perf_counter()
            self._llm.collective_rpc("swap", args=(repeat * self.MEMBERS + member, self.job["sigma"]))
            noise += time.perf_counter() - start
            own = slice(member * per_member, (member + 1) * per_member)
            part = Workload(prompts=work.prompts[own], new_tokens=work.new_tokens[own])
            sample += self._generate(part, [None] * per_member)
        measured = slice(0, self.MEMBERS * per_member)
        tokens = sum(map(len, work.prompts[measured])) + sum(work.new_tokens[measured])
        return Times(sample=sample + noise, noise=noise, tokens=tokens)


class SwapExtension:
    """Methods added to vLLM's worker for `Swap`."""

    @torch.inference_mode()
    def swap_start(self) -> None:
        """Collect the linear layers of the blocks and their weights."""
        model = self.model_runner.model  # type: ignore[attr-defined]
        self.swapped: list[tuple[Any, torch.Tensor]] = [
            (module, vars(module).get("es_loaded_weight", module.weight.data).clone())
            for name, module in model.named_modules()
            if isinstance(module, LinearBase) and name.rpartition(".")[2] in TARGET_MODULES
        ]
        forget_linear_weights(model)

    @torch.inference_mode()
    def swap(self, seed: int, sigma: float) -> None:
        """Serve the base weights plus sigma times standard normal noise of this seed."""
        generator = torch.Generator(self.swapped[0][1].device).manual_seed(seed)
        for module, base in self.swapped:
            noise = torch.empty(base.shape, dtype=torch.float32, device=base.device).normal_(generator=generator)
            weight = noise.mul_(sigma).add_(base).to(base.dtype)
            if base.device.type == "cpu":
                repack(module, weight)
            else:
                module.weight.copy_(weight)


def start_variant(job: dict[str, Any]) -> Variant:
    """Start what `job["kind"]` names."""
    if job["kind"] == "stock":
        return Population(job, stock=True)
    return {"plain": Plain, "population": Population, "files": Files, "swap": Swap}[job["kind"]](job)


def members_of(work: Workload, population: int) -> list[int]:
    """Return the member that answers each prompt: neighbours belong together."""
    per_member = math.ceil(len(work.prompts) / population)
    return [i // per_member for i in range(len(work.prompts))]


def sampling_params(new_tokens: int) -> SamplingParams:
    """Greedy, of exactly this many tokens."""
    return SamplingParams(
        temperature=0,
        max_tokens=new_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
