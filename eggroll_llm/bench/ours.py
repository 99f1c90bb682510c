"""What the benchmark compares with plain vLLM: our engine, and the other ways of evaluating a population with vLLM.

Each is started once and then run on a workload: prompts, dealt out to the members in turn, each with the number of
tokens to generate. No variant stops early or caches prefixes. What a method does between steps (writing adapters) or
members (swapping weights) counts as its noise; what falls between forward passes is in its sampling time (loading
adapters, swapping). Adapters are made from our own noise, which is fast; full-rank noise comes from torch.
"""

import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.linear import LinearBase
from vllm.platforms import current_platform

from eggroll_llm.bench.plain import Plain, about, memory_gib
from eggroll_llm.bench.workload import Times, Workload, members_of
from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.interface import Decoding, Request
from eggroll_llm.engine.memory import batch_tokens
from eggroll_llm.engine.token_tree import TokenTree
from eggroll_llm.engine.vllm.arguments import CPU_BLOCK
from eggroll_llm.engine.vllm.engine import VllmEngine
from eggroll_llm.engine.vllm.text import sampling_params
from eggroll_llm.engine.vllm.weights import forget_linear_weights, keep_linear_weights, repack
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.kernels.noise import served_factors_of
from eggroll_llm.models.targets import TARGET_MODULES, trained_parameters

RAM_DISK = Path("/dev/shm")
FILE_RANK = 8  # the rank buffer of the published code


class Population:
    """Our engine. Kind "stock" has our placing of members in memory and vLLM's adapter arithmetic."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        how = {
            "slots": job["slots"],
            "max_model_len": job["context"],
            "enforce_eager": not job["compiled"],
            "compile": job["compiled"] and current_platform.is_cpu(),
        }
        self._engine = VllmEngine(
            Path(job["model_dir"]),
            EngineConfig(**job["engine"] | how),
            EsSettings(rank=job["rank"]),
            prefix_caching=False,
            stock=job["kind"] == "stock",
            vllm_args=job["vllm_args"],
        )

    def run(self, work: Workload, repeat: int) -> Times:
        """Sample, then update with alternating fitness, which moves the weights as a real step does."""
        rank, sigma, population = self.job["rank"], self.job["sigma"], self.job["population"]
        noise = self._engine.begin(NoiseSpec(seed=0, step=repeat, rank=rank, sigma=sigma), population)
        members = members_of(work, population)
        requests = [
            Request(prompt_ids=tuple(prompt), member=member, seed=i)
            for i, (prompt, member) in enumerate(zip(work.prompts, members, strict=True))
        ]
        decoding = Decoding(max_tokens=max(work.new_tokens), temperature=work.temperature, ignore_eos=True)
        rules, own_sampler = self._engine.text_rules, self._engine.own_sampler
        params = {
            n: sampling_params(replace(decoding, max_tokens=n), rules, own_sampler=own_sampler)
            for n in set(work.new_tokens)
        }
        length_of = {id(request): n for request, n in zip(requests, work.new_tokens, strict=True)}
        start = time.perf_counter()
        self._engine.queue.add(
            dict(enumerate(requests)),
            lambda request: params[length_of[id(request)]](request),
            lambda output: output.request_id,
        )
        for _ in self._engine.queue.drain():
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
        in_sample = not current_platform.is_cpu()
        if in_sample:
            noise = self._engine._call("time_noise", population)
        return Times(sample=sample, noise=noise, update=times.update, serve=times.serve, noise_in_sample=in_sample)

    def score(self, work: Workload) -> float | None:
        """Score the second half of prompts, as many under all members together as the workload has.

        Every token counts that passes the model: of a prefix that prompts share, those of one.
        """
        if self.job["kind"] == "stock":  # vLLM's adapters are placed by its scheduler
            return None
        population, asked = self.job["population"], max(1, len(work.prompts) // self.job["population"])
        halves = [(tuple(p[: len(p) // 2]), tuple(p[len(p) // 2 :])) for p in work.prompts[:asked]]
        start = time.perf_counter()
        self._engine.score(halves, range(population))
        return population * len(TokenTree(halves)) / (time.perf_counter() - start)

    def memory_gib(self) -> float:
        """Return the memory of this process."""
        return memory_gib()

    def about(self) -> dict[str, Any]:
        """Return how this engine runs."""
        return about(self._engine._llm)

    def close(self) -> None:
        """Shut vLLM down."""
        self._engine.close()


class Files(Plain):
    """vLLM's adapters as the published code uses them: files in a RAM disk, written and loaded anew for each step."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(
            job,
            **in_process(job),
            enable_lora=True,
            max_loras=job["slots"],
            max_lora_rank=FILE_RANK,
            lora_target_modules=list(TARGET_MODULES),
        )
        self._dtype = getattr(torch, job["engine"]["dtype"])
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
        if current_platform.is_cpu():
            keep_linear_weights()
        super().__init__(job, **in_process(job), worker_extension_cls=f"{__name__}.SwapExtension")
        self._llm.collective_rpc("swap_start")

    def run(self, work: Workload, repeat: int) -> Times:
        """Swap and sample the first members; swapping is in their time, and for all of them the noise of a step."""
        per_member = len(work.prompts) // self.job["population"]
        noise = sample = 0.0
        for member in range(self.MEMBERS):
            start = time.perf_counter()
            self._llm.collective_rpc("swap", args=(repeat * self.MEMBERS + member, self.job["sigma"]))
            noise += time.perf_counter() - start
            own = slice(member * per_member, (member + 1) * per_member)
            part = replace(work, prompts=work.prompts[own], new_tokens=work.new_tokens[own])
            sample += self._generate(part, [None] * per_member)
        measured = slice(0, self.MEMBERS * per_member)
        tokens = sum(map(len, work.prompts[measured])) + sum(work.new_tokens[measured])
        whole = noise * self.job["population"] / self.MEMBERS
        return Times(sample=sample + noise, noise=whole, tokens=tokens)

    def memory_gib(self) -> float:
        """Return the memory of this process; vLLM's worker has another extension here."""
        return memory_gib()


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
        assert all(base.ndim == 2 for _, base in self.swapped), "vLLM has dropped the weights"
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


def in_process(job: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments in which our engine differs from vLLM as it ships, so that its kin share them."""
    on_cpu = current_platform.is_cpu()
    block = {"block_size": CPU_BLOCK} if on_cpu else {}
    return {"max_num_batched_tokens": batch_tokens(job["context"], on_cpu=on_cpu), **block}


Runner = Population | Plain


def start(job: dict[str, Any]) -> Runner:
    """Start what `job["kind"]` names."""
    match job["kind"]:
        case "plain":
            return Plain(job, **in_process(job))
        case "files":
            return Files(job)
        case "swap":
            return Swap(job)
        case _:
            return Population(job)
