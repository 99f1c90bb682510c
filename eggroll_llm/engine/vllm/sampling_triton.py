"""Sampling from the logits of a batch on the GPU, each row with a seed of its own, in one launch.

A token is drawn by the exponential race: the largest logit - log(E), E being exponential, wins as often as its
probability says. E is a pure function of (seed, position, token), so what is drawn depends neither on the batch nor on
when a request was scheduled (where `top_p` cuts the logits first, that may). vLLM's first model runner draws row after
row instead, after a softmax over all of them.

Shapes: Q request, V token of the vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = 512
"""Blocks of four tokens that a program looks at at a time."""
STREAM = 0x53616D70
"""Last word of the generator's counter, which noise of this package never has together with such a key."""


@triton.jit
def _exponential(word):
    """Return -log(1 - u), u = (word + 1/2) / 2^32, exact to some 1e-7 of itself however small it is."""
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    near_zero = u * (1.0 + u * (0.5 + u * (0.333333333 + u * 0.25)))
    return tl.where(u < 0.01, near_zero, -tl.log(tl.maximum(1.0 - u, 2.9802322387695312e-8)))


@triton.jit
def _sample(
    token_Q, logits_QV, seed_Q, position_Q, stride, STREAM: tl.constexpr, V: tl.constexpr, BLOCKS: tl.constexpr
):
    q = tl.program_id(0)
    seed = tl.load(seed_Q + q)
    zero = tl.zeros([BLOCKS], tl.uint32)
    position = zero + tl.load(position_Q + q).to(tl.uint32)
    best, token = tl.full([4 * BLOCKS], float("-inf"), tl.float32), tl.zeros([4 * BLOCKS], tl.int32)
    for first in range(0, V, 4 * BLOCKS):
        block = (first // 4 + tl.arange(0, BLOCKS)).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, position, block, zero, zero + STREAM)
        even, odd = tl.interleave(_exponential(w0), _exponential(w2)), tl.interleave(_exponential(w1), _exponential(w3))
        v = first + tl.arange(0, 4 * BLOCKS)
        logit = tl.load(logits_QV + q.to(tl.int64) * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
        score = logit - tl.log(tl.interleave(even, odd))
        token = tl.where(score > best, v, token)
        best = tl.where(score > best, score, best)
    winner = tl.where(best == tl.max(best, axis=0), token, V - 1)
    tl.store(token_Q + q, tl.min(winner, axis=0).to(tl.int64))


def sample(logits_QV: Tensor, seed_Q: Tensor, position_Q: Tensor) -> Tensor:
    """Return a token of each row, int64 [Q]. Logits may be -inf; seeds and positions are int64, one a row."""
    rows, vocabulary = logits_QV.shape
    token_Q = torch.empty(rows, dtype=torch.int64, device=logits_QV.device)
    if rows:
        _sample[(rows,)](
            token_Q, logits_QV, seed_Q, position_Q, logits_QV.stride(0), STREAM, vocabulary, BLOCKS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return token_Q
