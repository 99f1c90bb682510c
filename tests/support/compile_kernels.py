"""Compiles the Triton kernels for GPUs that need not be there, as the functions around them call them; launches none.

Prints a line for every variant: its name and target, fused multiply-adds, registers, bytes that did not fit into them,
bits of each load, and the rank of the term that it adds. Run in a process of its own, without TRITON_INTERPRET: `python
compile_kernels.py 80 90`.
"""

import contextlib
import io
import json
import re
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from eggroll_llm.engine.vllm.sampling_triton import sample
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.kernels import noise
from eggroll_llm.kernels.fold_triton import fold_triton
from eggroll_llm.kernels.member_term_triton import expand, shrink
from eggroll_llm.kernels.norms_triton import Factors, rms_norm, silu_and_mul

SLOTS, VOCABULARY = 2, 151936


@dataclass(frozen=True)
class Shape:
    """Of a model's blocks."""

    hidden: int
    keys: int
    intermediate: int


LARGE, SMALL = Shape(1536, 256, 8960), Shape(576, 192, 1536)  # Qwen2.5-1.5B and SmolLM2-135M


class Driver:
    """Stands in for the driver of a GPU of some compute capability."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # whose kernels are kept apart

    def get_current_stream(self, device: int) -> int:
        return 0


def served(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


class Rows:
    """Factors of layers one after the other in the rows of slots, as the engine has them."""

    def __init__(self, rank: int) -> None:
        self.rank, self.slot_T = rank, torch.zeros(2048, dtype=torch.int32)
        self._rows_SV, self._used = served(SLOTS, 1 << 19), 0

    def factors(self, slices: tuple[int, ...], inside: int) -> Factors:
        A_SV = self._take(self.rank * sum(slices))
        B_SCRI = self._take(len(slices) * self.rank * inside).unflatten(1, (len(slices), self.rank, inside))
        return Factors(A_SV, B_SCRI, self.slot_T, slices)

    def _take(self, values: int) -> Tensor:
        self._used += values
        return self._rows_SV[:, self._used - values : self._used]


def decode(shape: Shape, rank: int, tokens: int) -> None:
    """Call what a block calls in a forward pass, and the norm at the end, with the tensors of a CPU in their place."""
    rows, hidden, sizes = Rows(rank), shape.hidden, (shape.hidden, shape.keys, shape.keys)
    qkv, o = rows.factors(sizes, hidden), rows.factors((hidden,), hidden)
    gate_up = rows.factors((shape.intermediate, shape.intermediate), hidden)
    down, weight_I = rows.factors((hidden,), shape.intermediate), served(hidden)
    x, y_qkv, y_gate_up = (served(tokens, size) for size in (hidden, sum(sizes), 2 * shape.intermediate))
    _, h_qkv = rms_norm(x, None, weight_I, 1e-6, None, qkv)
    assert h_qkv is not None
    expand(y_qkv, h_qkv, qkv.A_SV, rows.slot_T, sizes)
    _, h_gate_up = rms_norm(x, x.clone(), weight_I, 1e-6, (o, shrink(x, o.B_SCRI, rows.slot_T)), gate_up)
    assert h_gate_up is not None
    _, h_down = silu_and_mul(y_gate_up, (gate_up, h_gate_up), down)
    assert h_down is not None
    rms_norm(x, x.clone(), weight_I, 1e-6, (down, h_down), qkv)
    rms_norm(x, x.clone(), weight_I, 1e-6, (down, h_down))


def others() -> None:
    """Call what makes noise, what folds it into weights, and what draws tokens."""
    layout = noise.RowLayout((("a.weight", 1536, 1536), ("b.weight", 1536, 8960)), 1)
    for seed, pairs in ((0, 1), (2**63, 5)):
        spec, pairs_K = NoiseSpec(seed=seed, step=1, rank=1, sigma=1.0), torch.arange(pairs)
        noise.place(served(pairs, layout.width), pairs_K, spec, pairs_K, pairs_K, layout)
    for terms in (1, 64):
        columns = [(torch.zeros(terms, 1536), torch.zeros(terms, 1536))]
        fold_triton(torch.zeros(1536, 1536), columns, None)
        fold_triton(torch.zeros(1536, 1536), columns, served(1536, 1536))
    for rows in (1, 3):
        sample(torch.zeros(rows, VOCABULARY), *torch.zeros(2, rows, dtype=torch.int64).unbind())


def main(capabilities: list[int]) -> None:
    compiled: dict[int, tuple[JITFunction, int, Any]] = {}
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, warmup: bool, **options: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            variant = run(kernel, *args, warmup=True, **options)
        if id(variant) not in compiled:
            compiled[id(variant)] = kernel, capability, (variant, log.getvalue())

    JITFunction.run = compile_only
    knobs.nvidia.dump_ptxas_log = True
    for capability in capabilities:
        driver.set_active(Driver(capability))
        for shape, rank in ((LARGE, 1), (LARGE, 8), (SMALL, 1)):
            for tokens in (1, 5, 1500):
                decode(shape, rank, tokens)
        others()
    for kernel, capability, (variant, log) in compiled.values():
        ptx, names = variant.asm["ptx"], kernel.arg_names
        loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
        found = {
            "kernel": kernel.__name__,
            "sm": capability,
            "fma": ptx.count("fma.rn.f32"),
            "registers": int(re.findall(r"Used (\d+) registers", log)[0]),
            "spilled": int(re.findall(r"(\d+) bytes spill stores", log)[0]),
            "loads": sorted(int(bits) * int(many or 1) for many, bits in loads),
            "rank": next((variant.src.constants[at] for at in variant.src.constants if names[at[0]] == "R"), 0),
        }
        print(json.dumps(found))


main([*map(int, sys.argv[1:])])
