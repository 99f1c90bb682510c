"""The per-member term of a linear layer:  y_t += A_s (B_s^T x_t),  s the slot of token t's member.

On a CPU `member_term.cpp` computes it in one pass; where it cannot be built, `add_term_torch` computes it more slowly,
equal up to rounding. On a GPU it is `member_term_triton`. All leave tokens of the base model (slot -1) untouched and
make each row depend on its own token alone, to the bit: where a completion depends on its batch (docs/determinism.md),
it is not through this term.

Shapes: T token, S slot, C slice of a fused layer (q, k, v or gate, up), R rank, O out features of all slices, I in,
V values of all A of a slot: the [R, out features] of one slice after the other.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from eggroll_llm.kernels import build
from eggroll_llm.kernels.binding import array_error, by_dtype, check_array, check_format

MAX_RANK = 64  # size of the kernel's buffer on the stack
FALLBACK_CHUNK = 256  # tokens that the fallback gathers factors for at a time, which bounds its memory

AddTerm = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Sequence[int]], None]


def add_term(y_TO: Tensor, x_TI: Tensor, A_SV: Tensor, B_SCRI: Tensor, slot_T: Tensor, slices: Sequence[int]) -> None:
    """Add each token's member term to `y_TO` in place.

    `slices` are the out features of the slices, in order; `slot_T` is int32, -1 for the base model, and may be longer
    than T. All tensors but `slot_T` have one dtype, float32 or bfloat16, and are contiguous but for any distance from
    one slot to the next; sums are float32 and rounded once. Raises ValueError, with nothing added, for other tensors
    and for a slot that does not exist.
    """
    implementation(y_TO.device.type)(y_TO, x_TI, A_SV, B_SCRI, slot_T, slices)


@cache
def implementation(device_type: str = "cpu") -> AddTerm:
    """Return the kernel for a device, or for a CPU the fallback where it cannot be built."""
    if device_type == "cuda":
        return add_term_triton
    library = build.library()
    return add_term_torch if library is None else bind(library)


def check_arguments(
    y_TO: Tensor,
    x_TI: Tensor,
    A_SV: Tensor,
    B_SCRI: Tensor,
    slot_T: Tensor,
    slices: Sequence[int],
    device_type: str = "cpu",
) -> None:
    """Raise ValueError for what `add_term` does not take on such a device, but for the values in `slot_T`."""
    check_format("y", y_TO)
    device = y_TO.device
    if device.type != device_type:
        raise array_error("y", y_TO, f"on a device of type {device_type}")
    dtype, tokens, out = y_TO.dtype, len(y_TO), sum(slices)
    inside = check_factors(A_SV, B_SCRI, slot_T, len(slices), out, dtype, device)
    check_array("y", y_TO, (tokens, out), dtype, device)
    check_array("x", x_TI, (tokens, inside), dtype, device)
    if len(slot_T) < tokens:
        raise array_error("slot", slot_T, f"of {tokens} tokens at least")


def check_factors(
    A_SV: Tensor, B_SCRI: Tensor, slot_T: Tensor, slices: int, out: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Return the in features of a layer's factors. Raises ValueError for what kernels do not take as such."""
    slots, _, rank, inside = B_SCRI.shape if B_SCRI.ndim == 4 else (0, 0, 0, 0)
    # Strides, as taking the first slot would cost more than all else here, in every layer of every forward pass.
    shape_A, shape_B, in_a_slot = (slots, rank * out), (slots, slices, rank, inside), (rank * inside, inside, 1)
    if A_SV.shape != shape_A or A_SV.stride(1) != 1 or A_SV.dtype is not dtype or A_SV.device != device:
        raise array_error("A", A_SV, f"{dtype} {[*shape_A]} on {device}, contiguous in each slot")
    fits = B_SCRI.shape == shape_B and B_SCRI.stride()[1:] == in_a_slot
    if not fits or B_SCRI.dtype is not dtype or B_SCRI.device != device:
        raise array_error("B", B_SCRI, f"{dtype} {[*shape_B]} on {device}, contiguous in each slot")
    check_array("slot", slot_T, (slot_T.numel(),), torch.int32, device)
    return inside


def _no_such_slot(slots: int) -> ValueError:
    return ValueError(f"a token's slot is none of the {slots} that there are")


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
    check_arguments(y_TO, x_TI, A_SV, B_SCRI, slot_T, slices)
    if (slot_T[: len(x_TI)] >= len(A_SV)).any():
        raise _no_such_slot(len(A_SV))
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


def add_term_triton(
    y_TO: Tensor, x_TI: Tensor, A_SV: Tensor, B_SCRI: Tensor, slot_T: Tensor, slices: Sequence[int]
) -> None:
    """The same term on a GPU, or in Triton's interpreter. A slot that does not exist counts as the base model's."""
    from eggroll_llm.kernels.member_term_triton import expand, shrink
    from eggroll_llm.kernels.rounding import DEVICE

    check_arguments(y_TO, x_TI, A_SV, B_SCRI, slot_T, slices, DEVICE)
    expand(y_TO, shrink(x_TI, B_SCRI, slot_T), A_SV, slot_T, slices)


def bind(library: ctypes.CDLL) -> AddTerm:
    """Return the compiled kernel of a library as a function of tensors."""
    functions = by_dtype(library, "add_term", [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 8, ctypes.c_bool)

    @cache
    def ends(slices: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
        return (ctypes.c_int64 * len(slices))(*torch.tensor(slices).cumsum(0).tolist())

    def add_term_native(
        y_TO: Tensor, x_TI: Tensor, A_SV: Tensor, B_SCRI: Tensor, slot_T: Tensor, slices: Sequence[int]
    ) -> None:
        check_arguments(y_TO, x_TI, A_SV, B_SCRI, slot_T, slices)
        if B_SCRI.shape[2] > MAX_RANK:
            raise array_error("B", B_SCRI, f"of rank {MAX_RANK} at most")
        slots_exist = functions[y_TO.dtype](
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
            len(A_SV),
            A_SV.stride(0),
            B_SCRI.stride(0),
        )
        if not slots_exist:
            raise _no_such_slot(len(A_SV))

    return add_term_native
