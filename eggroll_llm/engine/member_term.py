"""The per-member term of a linear layer on CPU:  y_t += A_s (B_s^T x_t),  s the slot of token t's member.

`member_term.cpp` computes it in one pass; where it cannot be built, `add_term_torch` computes it more slowly, equal up
to rounding. Both leave tokens of the base model (slot -1) untouched and make each row depend on its own token alone,
to the bit: where a completion depends on its batch (README, "Determinism and numerics"), it is not through this term.

Shapes: T token, S slot, C slice of a fused layer (q, k, v or gate, up), R rank, O out features of all slices, I in,
V values of all A of a slot: the [R, out features] of one slice after the other.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from eggroll_llm.engine import native
from eggroll_llm.engine.binding import by_dtype

MAX_RANK = 64  # size of the kernel's buffer on the stack
FALLBACK_CHUNK = 256  # tokens that the fallback gathers factors for at a time, which bounds its memory

AddTerm = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Sequence[int]], None]


def add_term(y_TO: Tensor, x_TI: Tensor, A_SV: Tensor, B_SCRI: Tensor, slot_T: Tensor, slices: Sequence[int]) -> None:
    """Add each token's member term to `y_TO` in place.

    `slices` are the out features of the slices, in order; `slot_T` is int32, -1 for the base model. All tensors but
    `slot_T` have one dtype, float32 or bfloat16, and are contiguous but for any distance from one slot to the next;
    sums are float32 and rounded once.
    """
    implementation()(y_TO, x_TI, A_SV, B_SCRI, slot_T, slices)


@cache
def implementation() -> AddTerm:
    """Return the compiled kernel, or the fallback where it cannot be built."""
    library = native.library()
    return add_term_torch if library is None else bind(library)


@cache
def graph_operator() -> AddTerm:
    """Return `add_term` as an operator that torch.compile leaves as it is, inside a graph."""
    torch.library.define(
        "eggroll::add_member_term", "(Tensor(a!) y, Tensor x, Tensor A, Tensor B, Tensor slot, int[] slices) -> ()"
    )
    torch.library.impl("eggroll::add_member_term", "CPU", implementation())
    operator: AddTerm = torch.ops.eggroll.add_member_term.default
    return operator


def add_term_torch(
    y_TO: Tensor, x_TI: Tensor, A_SV: Tensor, B_SCRI: Tensor, slot_T: Tensor, slices: Sequence[int]
) -> None:
    """The same term in torch operations: correct everywhere, and slower, as factors are copied for every token."""
    for rows in torch.nonzero(slot_T[: len(x_TI)] >= 0).flatten().split(FALLBACK_CHUNK):
        slots = slot_T[rows]
        h_TCR = (x_TI[rows].float()[:, None, None] * B_SCRI[slots].float()).sum(-1)
        y = y_TO[rows].float()
        rank = h_TCR.shape[2]
        A_of_slices = A_SV[slots].float().split([rank * size for size in slices], dim=1)
        for c, (part, A_TV) in enumerate(zip(y.split(list(slices), dim=1), A_of_slices, strict=True)):
            for r, A_TO in enumerate(A_TV.chunk(rank, dim=1)):
                part += h_TCR[:, c, r, None] * A_TO
        y_TO[rows] = y.to(y_TO.dtype)


def bind(library: ctypes.CDLL) -> AddTerm:
    """Return the compiled kernel of a library as a function of tensors."""
    functions = by_dtype(library, "add_term", [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 7)

    @cache
    def ends(slices: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
        return (ctypes.c_int64 * len(slices))(*torch.tensor(slices).cumsum(0).tolist())

    def add_term_native(
        y_TO: Tensor, x_TI: Tensor, A_SV: Tensor, B_SCRI: Tensor, slot_T: Tensor, slices: Sequence[int]
    ) -> None:
        assert y_TO.is_contiguous(), "the kernel walks rows by their width"
        assert x_TI.is_contiguous()
        assert B_SCRI.shape[2] <= MAX_RANK
        assert A_SV[0].is_contiguous()
        assert B_SCRI[0].is_contiguous()
        functions[y_TO.dtype](
            y_TO.data_ptr(),
            x_TI.data_ptr(),
            A_SV.data_ptr(),
            B_SCRI.data_ptr(),
            slot_T.data_ptr(),
            ends(tuple(slices)),
            *x_TI.shape,
            y_TO.shape[1],
            B_SCRI.shape[2],
            B_SCRI.shape[1],
            A_SV.stride(0),
            B_SCRI.stride(0),
        )

    return add_term_native
