"""Compiles every Triton kernel for a GPU that need not be there; prints a line of what became of each.

That is its name and target, fused multiply-adds, registers, bytes that did not fit into them, and bits of each load.
Run in a process of its own, without TRITON_INTERPRET: `python compile_kernels.py 80 90`.
"""

import contextlib
import io
import json
import re
import sys
from typing import Any

import torch  # noqa: F401 - Triton looks for it
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from eggroll_llm.engine.vllm import sampling_triton
from eggroll_llm.kernels import fold_triton, member_term_triton, noise_triton, norms_triton

SERVED, FLOATS, NUMBERS, WORDS, NUMBER, FLOAT = "*bf16", "*fp32", "*i32", "*i64", "i32", "fp32"
TERM = {
    "x_TI": SERVED,
    "B_SCRI": SERVED,
    "A_SV": SERVED,
    "slot_T": NUMBERS,
    "slots": NUMBER,
    "tokens": NUMBER,
    "at_once": NUMBER,
}
STRIDES = {"x_stride": NUMBER, "y_stride": NUMBER, "slot_A": NUMBER, "slot_B": NUMBER}
FUSED = {"h_TR": FLOATS, "h_TCR": FLOATS, "after_TCR": FLOATS, "y_TI": SERVED, "y_TO": SERVED}
TYPES: dict[str, str] = {
    **TERM, **STRIDES, **FUSED, "ends_C": NUMBERS, "residual_TI": SERVED, "weight_I": SERVED, "epsilon": FLOAT,
    "rows_SV": SERVED, "width": NUMBER, "row_K": WORDS, "negative_K": WORDS, "pair_K": WORDS, "id_N": WORDS,
    "at_A_N": WORDS, "at_B_N": WORDS, "pairs": NUMBER, "scale": FLOAT, "step": NUMBER,
    "seed_low": NUMBER, "seed_high": NUMBER, "table": FLOATS,
    "weight_OI": FLOATS, "served_OI": SERVED, "A_KO": FLOATS, "B_KI": FLOATS, "terms": NUMBER, "out": NUMBER,
    "inside": NUMBER, "first_block": NUMBER, "first_A": NUMBER, "first_B": NUMBER,
    "token_Q": WORDS, "logits_QV": FLOATS, "seed_Q": WORDS, "position_Q": WORDS, "stride": NUMBER,
}  # fmt: skip
NORM = {"SIZE": 1536, "BLOCK": 2048}
NOTHING_BEFORE = {"h_TR": None, "A_SV": None}
WITHOUT = {**NOTHING_BEFORE, "after_TCR": None, "B_SCRI": None}
KERNELS: list[tuple[Any, dict[str, Any]]] = [  # as they are called for Qwen2.5-1.5B at ranks 1 and 8
    (member_term_triton._shrink, {"INSIDE": 1536, "ROWS": 1, "BLOCK_ROWS": 1, "BLOCK_I": 2048}),
    (member_term_triton._shrink, {"INSIDE": 1536, "ROWS": 8, "BLOCK_ROWS": 8, "BLOCK_I": 512}),
    (member_term_triton._expand, {"SLICES": (1536, 256, 256), "R": 1, "BLOCK": 256, "num_warps": 1}),
    (member_term_triton._expand, {"SLICES": (1536, 256, 256), "R": 8, "BLOCK": 256, "num_warps": 1}),
    (norms_triton._rms_norm, {"R": 0, "AFTER": 0, "ROWS": 1, "HAS_RESIDUAL": False, **NORM, **WITHOUT}),
    (norms_triton._rms_norm, {"R": 0, "AFTER": 3, "ROWS": 4, "HAS_RESIDUAL": True, **NORM, **NOTHING_BEFORE}),
    (norms_triton._rms_norm, {"R": 1, "AFTER": 2, "ROWS": 2, "HAS_RESIDUAL": True, **NORM}),
    (norms_triton._rms_norm, {"R": 8, "AFTER": 24, "ROWS": 4, "HAS_RESIDUAL": True, **NORM}),
    (norms_triton._silu_and_mul, {"SIZE": 8960, "R": 1, "AFTER": 1, "ROWS": 1, "BLOCK": 1024, "num_warps": 8}),
    (norms_triton._silu_and_mul, {"SIZE": 8960, "R": 8, "AFTER": 8, "ROWS": 8, "BLOCK": 1024, "num_warps": 8}),
    (noise_triton._place, {"R": 3, "BLOCKS": 512}),
    (fold_triton._fold, {"SERVES": True, "BLOCK": 64, "BLOCK_K": 16}),
    (fold_triton._fold, {"SERVES": False, "BLOCK": 64, "BLOCK_K": 16}),
    (sampling_triton._sample, {"STREAM": sampling_triton.STREAM, "V": 151936, "BLOCKS": 512}),
]

knobs.nvidia.dump_ptxas_log = True

for capability in map(int, sys.argv[1:]):
    for kernel, constants in KERNELS:
        at = {param.name: (param.num,) for param in kernel.params}
        aligned = [
            at[param.name]
            for param in kernel.params
            if param.name not in constants and not (param.do_not_specialize or param.do_not_specialize_on_alignment)
        ]
        source = ASTSource(
            fn=kernel,
            signature={name: "constexpr" if name in constants else TYPES[name] for name in at},
            constexprs={at[name]: value for name, value in constants.items() if name in at},
            attrs={place: [["tt.divisibility", 16]] for place in aligned},  # as those of tensors and real sizes are
        )
        options = {"enable_fp_fusion": kernel is not noise_triton._place, "num_warps": constants.get("num_warps", 4)}
        with contextlib.redirect_stdout(io.StringIO()) as assembler:
            compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        ptx, log = compiled.asm["ptx"], assembler.getvalue()
        loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
        found = {
            "kernel": kernel.__name__,
            "sm": capability,
            "fma": ptx.count("fma.rn.f32"),
            "registers": int(re.findall(r"Used (\d+) registers", log)[0]),
            "spilled": int(re.findall(r"(\d+) bytes spill stores", log)[0]),
            "loads": sorted(int(bits) * int(many or 1) for many, bits in loads),
        }
        print(json.dumps(found))
