"""What transformers makes of a model, in a process in which there is no vLLM.

vLLM's Transformers backend changes the classes of transformers in the process that serves them, for good.
"""

import copy
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from eggroll_llm.config.schema import RunConfig


def dense_logprobs(
    model_dir: Path, prompts: Sequence[Sequence[int]], added: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Return the log-probabilities [prompts, vocabulary] after each prompt in float32, `added` added to the weights."""
    arrays = {name: delta.numpy() for name, delta in (added or {}).items()}
    return torch.from_numpy(_process().submit(_logprobs, model_dir, prompts, arrays).result())


def dense_scores(
    model_dir: Path, completions: Sequence[tuple[Sequence[int], Sequence[int]]], added: Mapping[str, Tensor]
) -> Tensor:
    """Return the log-probability of each token of completions, (prompt, completion), as `dense_logprobs` computes."""
    arrays = {name: delta.numpy() for name, delta in added.items()}
    return torch.from_numpy(_process().submit(_scores, model_dir, completions, arrays).result())


def adapted_layers(model_dir: Path, config: RunConfig) -> set[str]:
    """Return the names of the layers to which GRPO under this recipe gives adapters."""
    return _process().submit(_adapted_layers, model_dir, config).result()


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _logprobs(model_dir, prompts, added):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return _model(model_dir, added)(torch.tensor(prompts)).logits[:, -1].log_softmax(-1).numpy()


def _scores(model_dir, completions, added):  # type: ignore[no-untyped-def]
    model, scores = _model(model_dir, added), []
    for prompt, completion in completions:
        with torch.no_grad():
            logprobs = model(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
        scores.append(logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None]).flatten())
    return torch.cat(scores).numpy()


def _model(model_dir, added):  # type: ignore[no-untyped-def]
    model = copy.deepcopy(_loaded(model_dir, (model_dir / "model.safetensors").stat().st_mtime_ns))
    with torch.no_grad():
        for name, delta in added.items():
            model.get_parameter(name).add_(torch.from_numpy(delta))
    return model


@lru_cache(maxsize=4)
def _loaded(model_dir, written):  # type: ignore[no-untyped-def]
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def _adapted_layers(model_dir, config):  # type: ignore[no-untyped-def]
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from eggroll_llm.training.grpo_trl.trainer import adapters

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), adapters(config)).get_base_model()
    return {name for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
