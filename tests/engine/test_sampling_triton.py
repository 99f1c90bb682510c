"""Tokens are drawn as likely as their logits say, and by their row's seed and position alone."""

import pytest
import torch
from scipy.stats import chisquare

from eggroll_llm.engine.vllm.sampling_triton import STREAM, sample
from eggroll_llm.es.noise import WORD, philox4x32
from eggroll_llm.kernels.rounding import DEVICE


def drawn(logits_QV: torch.Tensor, seed_Q: torch.Tensor, position_Q: torch.Tensor) -> torch.Tensor:
    return sample(logits_QV.to(DEVICE), seed_Q.to(DEVICE), position_Q.to(DEVICE)).cpu()


def test_frequencies_are_probabilities() -> None:
    rows, logits_V = 600, torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf, 0.5])
    tokens = drawn(logits_V.expand(rows, -1).contiguous(), torch.arange(rows), torch.full((rows,), 7))
    counts = torch.bincount(tokens, minlength=6)
    assert counts[4] == 0
    possible = [0, 1, 2, 3, 5]
    assert chisquare(counts[possible], rows * logits_V.double().softmax(-1)[possible]).pvalue > 1e-3


def test_it_is_the_exponential_race_over_the_generator_of_the_noise() -> None:
    """For more tokens than a program looks at at a time, and none of the last few of a block."""
    rows, vocabulary = 4, 4999
    logits_QV = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
    seed_Q, position_Q = torch.tensor([0, 1, 2**40 + 5, 2**62]), torch.tensor([3, 3, 9, 100_000])
    block = torch.arange(-(-vocabulary // 4))
    for q, token in enumerate(drawn(logits_QV, seed_Q, position_Q).tolist()):
        position, zero = position_Q[q].expand_as(block), torch.zeros_like(block)
        key = int(seed_Q[q]) & WORD, int(seed_Q[q]) >> 32
        words = torch.stack(philox4x32((position, block, zero, zero + STREAM), key), dim=-1).bitwise_and(WORD)
        race = logits_QV[q].double() - (-torch.log1p(-(words.double() + 0.5) / 2**32)).log().flatten()[:vocabulary]
        assert token == int(race.argmax())


def test_rows_do_not_depend_on_the_batch() -> None:
    logits_QV = torch.randn(6, 300, generator=torch.Generator().manual_seed(1))
    seed_Q, position_Q = torch.tensor([5, 6, 5, 5, 8, 9]), torch.tensor([1, 1, 2, 1, 1, 1])
    logits_QV[3] = logits_QV[0]
    together = drawn(logits_QV, seed_Q, position_Q)
    assert together[0] == together[3]
    for q in range(6):
        assert drawn(logits_QV[q : q + 1], seed_Q[q : q + 1], position_Q[q : q + 1]) == together[q : q + 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_that_is_possible_is_drawn(dtype: torch.dtype) -> None:
    logits_QV = torch.full((1, 70), -torch.inf, dtype=dtype)
    logits_QV[0, 69] = -3.0
    assert drawn(logits_QV, torch.tensor([1]), torch.tensor([1])).item() == 69
