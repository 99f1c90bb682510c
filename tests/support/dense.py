"""What transformers computes with weights written down densely, in a process in which there is no vLLM.

Its Transformers backend changes classes of transformers in the process that serves them.
"""

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


def dense_logprobs(
    model_dir: Path, prompts: Sequence[Sequence[int]], added: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Return the log-probabilities [prompts, vocabulary] after each prompt in float32, `added` added to the weights."""
    arrays = {name: delta.numpy() for name, delta in (added or {}).items()}
    return torch.from_numpy(_process().submit(_logprobs, model_dir, prompts, arrays).result())


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _logprobs(model_dir, prompts, added):  # type: ignore[no-untyped-def]
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        for name, delta in added.items():
            model.get_parameter(name).add_(torch.from_numpy(delta))
        return model(torch.tensor(prompts)).logits[:, -1].log_softmax(-1).numpy()
