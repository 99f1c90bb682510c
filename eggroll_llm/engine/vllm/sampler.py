"""Seeded sampling on a GPU without a loop over requests (`sampling_triton`).

A request of a population has its own seed. vLLM's first model runner would give each a generator and fill a row of
noise for each in a launch of its own, hundreds in a step. Here seeds and positions of the batch go to one kernel, and
requests carry their seed as an extra argument, which vLLM leaves alone.
"""

import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

_SEED = "seed"


def seed_argument(seed: int | None) -> dict[str, Any]:
    """Return the `SamplingParams.extra_args` of a request with this seed, or one that nobody knows."""
    return {_SEED: secrets.randbits(63) if seed is None else seed}


def install(runner: Any) -> None:
    """Replace the random sampling of a model runner, on its instance."""
    from eggroll_llm.engine.vllm.sampling_triton import sample  # which imports Triton

    sampler = runner.sampler.topk_topp_sampler
    sampler.forward = partial(_forward, runner, sampler.logprobs_mode, sample)


def _forward(
    runner: Any,
    logprobs_mode: str,
    sample: Callable[[Tensor, Tensor, Tensor], Tensor],
    logits_QV: Tensor,
    generators: object,
    k: Tensor | None,
    p: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Stand in for vLLM's `TopKTopPSampler.forward`. Requests without a seed, which are greedy, share one."""
    logits_QV = apply_top_k_top_p(logits_QV, k, p)
    returned = None
    if logprobs_mode == "processed_logprobs":
        returned = logits_QV.log_softmax(dim=-1, dtype=torch.float32)
    rows, device = len(logits_QV), logits_QV.device
    arguments = [runner.requests[request_id].sampling_params.extra_args for request_id in runner.input_batch.req_ids]
    seeds = torch.zeros(rows, dtype=torch.int64, pin_memory=logits_QV.is_cuda)  # vLLM warms up without requests
    seeds[: len(arguments)] = torch.tensor([(extra or {}).get(_SEED, 0) for extra in arguments], dtype=torch.int64)
    last_token_Q = runner.query_start_loc.gpu[1 : rows + 1].long() - 1
    return sample(logits_QV, seeds.to(device, non_blocking=True), runner.positions[last_token_Q]), returned
