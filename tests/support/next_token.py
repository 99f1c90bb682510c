"""What an engine serves as the next token of prompts: the log-probability of every token there is."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eggroll_llm.engine.interface import Request

if TYPE_CHECKING:
    from eggroll_llm.engine.vllm.engine import VllmEngine


def next_token_logprobs(engine: "VllmEngine", requests: Sequence[Request]) -> Tensor:
    """Return the log-probabilities [requests, vocabulary] of the token after each prompt, float32."""
    from vllm import SamplingParams  # whose environment the engine has set

    params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
    engine.queue.add(dict(enumerate(requests)), lambda request: params, lambda output: output.outputs[0].logprobs[0])
    first = dict(engine.queue.drain())
    rows = [first[i] for i in range(len(requests))]
    return torch.tensor([[row[token_id].logprob for token_id in range(len(row))] for row in rows])
