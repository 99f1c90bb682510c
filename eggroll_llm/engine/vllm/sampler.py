"""What we change in vLLM's sampling: seeds on a GPU without a loop over requests, and a budget for thoughts.

A request of a population has its own seed. vLLM's first model runner would give each a generator and fill a row of
noise for each in a launch of its own, hundreds in a step. Here seeds and positions of the batch go to one kernel
(`sampling_triton`), and requests carry their seed as an extra argument, which vLLM leaves alone.

vLLM's own `thinking_token_budget` does not serve: it forgets what it has counted when a request is preempted, and
searches the whole completion at every token.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

_SEED, _THOUGHTS, _BUDGET = "seed", "thoughts", "thinking_token_budget"


def seed_argument(seed: int | None) -> dict[str, Any]:
    """Return the `SamplingParams.extra_args` of a request with this seed, or one that nobody knows."""
    return {_SEED: secrets.randbits(63) if seed is None else seed}


def install(runner: Any) -> None:
    """Replace the random sampling of a model runner, on its instance."""
    from eggroll_llm.engine.vllm.sampling_triton import sample  # which imports Triton

    sampler = runner.sampler.topk_topp_sampler
    sampler.forward = partial(_forward, runner, _Seeds(runner), sampler.logprobs_mode, sample)


class _Seeds:
    """The seeds of the batch, on its device; they are sent there when its requests or their order change."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._ids: list[str] = []
        self._seed_Q = torch.zeros(0, dtype=torch.int64)

    def of(self, rows: int, device: torch.device) -> Tensor:
        """Return them, int64 [rows]. Requests without a seed, which are greedy, share one."""
        ids = self._runner.input_batch.req_ids
        if ids != self._ids or rows != len(self._seed_Q):
            arguments = [self._runner.requests[request_id].sampling_params.extra_args or {} for request_id in ids]
            seeds = torch.zeros(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
            # vLLM warms up without requests.
            seeds[: len(ids)] = torch.tensor([extra.get(_SEED, 0) for extra in arguments], dtype=torch.int64)
            self._ids, self._seed_Q = list(ids), seeds.to(device, non_blocking=True)
        return self._seed_Q


def _forward(
    runner: Any,
    seeds: _Seeds,
    logprobs_mode: str,
    sample: Callable[[Tensor, Tensor, Tensor], Tensor],
    logits_QV: Tensor,
    generators: object,
    k: Tensor | None,
    p: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Stand in for vLLM's `TopKTopPSampler.forward`."""
    logits_QV = apply_top_k_top_p(logits_QV, k, p)
    returned = None
    if logprobs_mode == "processed_logprobs":
        returned = logits_QV.log_softmax(dim=-1, dtype=torch.float32)
    rows = len(logits_QV)
    last_token_Q = runner.query_start_loc.gpu[1 : rows + 1].long() - 1
    return sample(logits_QV, seeds.of(rows, logits_QV.device), runner.positions[last_token_Q]), returned


def thought_argument(tags: Mapping[int, int], budget: int) -> dict[str, Any]:
    """Return the `SamplingParams.extra_args` of a request with a budget; tags open a thought -> close it."""
    return {_THOUGHTS: dict(tags), _BUDGET: budget}


class ThoughtBudget(LogitsProcessor):
    """Leaves a completion whose thoughts have taken their budget of tokens no token but the one that closes them.

    What it does depends on prompt and completion alone, so a preempted request goes on as it would have.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._by_row: dict[int, _Thoughts] = {}

    def is_argmax_invariant(self) -> bool:
        """Return that greedy decoding is changed, too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests to their rows in the batch."""
        process_dict_updates(self._by_row, batch_update, _thoughts)

    def apply(self, logits: Tensor) -> Tensor:
        """Force the closing tag in the rows [requests, vocabulary] where it is due."""
        due = [(row, tag) for row, thoughts in self._by_row.items() if (tag := thoughts.due()) is not None]
        if due:
            row_D, tag_D = torch.tensor(due, device=self._device).T
            logits[row_D] = -torch.inf
            logits[row_D, tag_D] = 0.0
        return logits


@dataclass(slots=True)
class _Thoughts:
    """The thoughts of a request."""

    tags: Mapping[int, int]
    budget: int
    completion: list[int]
    """vLLM's own list, which grows."""
    closing: int | None = None
    """The tag that closes the thought that is open."""
    seen: int = 0
    """Tokens of the completion that were read."""
    spent: int = 0
    """Those of them in thoughts."""

    def due(self) -> int | None:
        """Return the tag that has to be next."""
        self.spent += self.read(self.completion[self.seen :])
        self.seen = len(self.completion)
        return self.closing if self.spent >= self.budget else None

    def read(self, token_ids: Sequence[int]) -> int:
        """Return how many of the next tokens are in thoughts, tags excluded but for those that open one within one."""
        inside = 0
        for token_id in token_ids:
            if self.closing is None:
                self.closing = self.tags.get(token_id)
            elif token_id == self.closing:
                self.closing = None
            else:
                inside += 1
        return inside


def _thoughts(params: SamplingParams, prompt: list[int] | None, completion: list[int]) -> _Thoughts | None:
    extra = params.extra_args or {}
    if _BUDGET not in extra:
        return None
    thoughts = _Thoughts(extra[_THOUGHTS], extra[_BUDGET], completion)
    thoughts.read(prompt or ())
    return thoughts
