"""`es.estimate.Fold` on the GPU: products, their sum with a weight and its rounding in one pass over it.

The sum over terms goes in order, in float32 without TF32, so its bits do not depend on how many processors the GPU has.
A launch takes a chunk of pairs, and reads and writes the weight once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eggroll_llm.es.estimate import Products, marking_the_last
from eggroll_llm.kernels.binding import check_array, check_format
from eggroll_llm.kernels.rounding import rounded

BLOCK, BLOCK_K = 64, 16


@triton.jit(do_not_specialize=["terms"])
def _fold(
    weight_OI, served_OI, A_KO, B_KI, terms, out, inside, SERVES: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # first, as a GPU takes 65,535 of the second: a vector is long
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, terms, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask_A, mask_B = (k < terms)[None, :] & (o < out)[:, None], (k < terms)[:, None] & (i < inside)[None, :]
        A = tl.load(A_KO + k[None, :] * out + o[:, None], mask=mask_A, other=0.0)
        B = tl.load(B_KI + k.to(tl.int64)[:, None] * inside + i[None, :], mask=mask_B, other=0.0)
        total = tl.dot(A, B, total, input_precision="ieee")
    mask = (o < out)[:, None] & (i < inside)[None, :]
    at = o.to(tl.int64)[:, None] * inside + i[None, :]
    total += tl.load(weight_OI + at, mask=mask, other=0.0)
    tl.store(weight_OI + at, total, mask=mask)
    if SERVES:
        tl.store(served_OI + at, rounded(total, served_OI.dtype.element_ty), mask=mask)


def fold_triton(to_OI: Tensor, products: Products, served_OI: Tensor | None) -> None:
    """Compute `es.estimate.Fold` of tensors on one GPU. Raises ValueError for others."""
    out, inside, device = len(to_OI), to_OI.shape[-1], to_OI.device
    check_array("the weight", to_OI, (out, inside), torch.float32, device)
    if served_OI is not None:
        check_format("the served weight", served_OI)
        check_array("the served weight", served_OI, (out, inside), served_OI.dtype, device)
    for columns_A, columns_B, last in marking_the_last(products):
        serves = served_OI is not None and last
        columns_A, columns_B = columns_A.contiguous(), columns_B.contiguous()
        check_array("columns of A", columns_A, (len(columns_A), out), torch.float32, device)
        check_array("columns of B", columns_B, (len(columns_A), inside), torch.float32, device)
        _fold[triton.cdiv(inside, BLOCK), triton.cdiv(out, BLOCK)](
            to_OI, served_OI if serves else to_OI, columns_A, columns_B, len(columns_A), out, inside, serves,
            BLOCK, BLOCK_K, enable_fp_fusion=True,
        )  # fmt: skip
