"""Weights handed over by a trainer: logits(vLLM) = logits(transformers) after every one of them has moved.

And what a trainer needs to know of the completions: the log-probability of each token where it was drawn.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from next_token import next_token_logprobs
from torch import Tensor

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.interface import Decoding, Request
from eggroll_llm.engine.vllm.engine import VllmEngine
from eggroll_llm.engine.vllm.text import TextRules
from eggroll_llm.errors import ModelError

pytestmark = pytest.mark.vllm

PROMPTS = tuple(tuple((7 * i + j) % 300 + 3 for j in range(40)) for i in range(3))


@dataclass
class Served:
    engine: VllmEngine
    model_dir: Path
    tolerance: float


@pytest.fixture(scope="module")
def served(tiny_model: Callable[[str], Path]) -> Iterator[Served]:
    """Of one kind, in float32: `test_engine.py` has all of them, and bfloat16."""
    config = EngineConfig(dtype="float32", kv_cache_gib=0.05, slots=1, max_sequences=16, max_model_len=128)
    model_dir = tiny_model("qwen3")
    engine = VllmEngine(model_dir, config, logprobs=True)
    yield Served(engine, model_dir, 1e-4)
    engine.close()


def model_of(model_dir: Path) -> Any:
    return copy.deepcopy(loaded(model_dir))


@cache
def loaded(model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def moved(model: Any, seed: int) -> Any:
    """The model with every parameter moved, by more than bfloat16 can hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * parameter.abs().mean().clamp(min=0.02) * noise)
    return model


def logprobs(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor(PROMPTS)).logits[:, -1].log_softmax(-1)


def ours(engine: VllmEngine) -> Tensor:
    return next_token_logprobs(engine, [Request(prompt_ids=prompt) for prompt in PROMPTS])


def test_every_parameter_is_served(served: Served) -> None:
    """Twice, as what is packed once may not pack again; and back to the start, to the bit."""
    before = ours(served.engine)
    base = model_of(served.model_dir)
    for seed in (1, 2):
        model = moved(model_of(served.model_dir), seed)
        served.engine.load_weights(model.state_dict())
        rounded = {name: tensor.to(served.engine.dtype).float() for name, tensor in model.state_dict().items()}
        model.load_state_dict(rounded)
        found = ours(served.engine)
        assert (found - before).abs().max() > 1.0  # or nothing would be proven
        assert (found - logprobs(model)).abs().max() < served.tolerance
    served.engine.load_weights(base.state_dict())
    assert torch.equal(ours(served.engine), before)


@pytest.mark.parametrize("part", ["embed_tokens", "norm.weight", "self_attn.q_proj", "mlp.down_proj", "lm_head"])
def test_each_kind_of_parameter_counts_alone(served: Served, part: str) -> None:
    """Moving only these changes the logits, as it does in transformers: none is left behind by the others."""
    base, model = model_of(served.model_dir), model_of(served.model_dir)
    state = model.state_dict()
    chosen = [name for name in state if part in name]
    assert chosen
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in chosen:
            state[name] += 0.3 * state[name].abs().mean() * torch.randn(state[name].shape, generator=generator)
    model.load_state_dict({name: tensor.to(served.engine.dtype).float() for name, tensor in state.items()})
    before = ours(served.engine)
    served.engine.load_weights(model.state_dict())
    found = ours(served.engine)
    assert (found - before).abs().max() > 2 * served.tolerance
    assert (found - logprobs(model)).abs().max() < served.tolerance
    served.engine.load_weights(base.state_dict())
    assert torch.equal(ours(served.engine), before)


def test_the_prefix_cache_is_of_the_new_weights(served: Served) -> None:
    """The same prompt, first with other weights, then again: cached keys of the old weights would show."""
    base = model_of(served.model_dir)
    before = ours(served.engine)
    served.engine.load_weights(moved(model_of(served.model_dir), 4).state_dict())
    ours(served.engine)
    served.engine.load_weights(base.state_dict())
    assert torch.equal(ours(served.engine), before)


def test_weights_of_another_model_are_refused(served: Served) -> None:
    state = model_of(served.model_dir).state_dict()
    before = ours(served.engine)
    state["model.extra.weight"] = state.pop("model.norm.weight") + 1
    with pytest.raises(ModelError, match=r"2 tensors are in the trained model or in vLLM's .* 'model\.extra\.weight'"):
        served.engine.load_weights(state)
    assert torch.equal(ours(served.engine), before)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"],
)
def test_weights_of_another_shape_are_refused(served: Served, name: str) -> None:
    """Before any is written: a copy of fewer rows would go through."""
    state = {name: tensor + 1 for name, tensor in model_of(served.model_dir).state_dict().items()}
    before = ours(served.engine)
    state[name] = state[name][:-1]
    with pytest.raises(ModelError, match=rf"{name} has shape \[.*\] in the trained model and \[.*\] in vLLM's"):
        served.engine.load_weights(state)
    assert torch.equal(ours(served.engine), before)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 0.8), (0.0, 1.0)])
def test_logprobs_are_those_of_the_distribution_that_was_sampled(
    served: Served, temperature: float, top_p: float
) -> None:
    """log softmax(logits / temperature) within the nucleus, at each generated token; greedy counts as temperature 1."""
    decoding = Decoding(max_tokens=12, temperature=temperature, top_p=top_p, logprobs=True)
    requests = [Request(prompt_ids=prompt, seed=5 + i) for i, prompt in enumerate(PROMPTS)]
    completions = served.engine.generate(requests, decoding)
    model = model_of(served.model_dir)
    for request, completion in zip(requests, completions, strict=True):
        ids = list(request.prompt_ids + completion.token_ids)
        with torch.no_grad():
            logits_TV = model(torch.tensor([ids])).logits[0, len(request.prompt_ids) - 1 : -1]
        logits_TV = logits_TV / (temperature or 1.0)
        if top_p < 1:
            ordered, order = logits_TV.softmax(-1).sort(descending=True)
            outside = (ordered.cumsum(-1) - ordered) >= top_p
            logits_TV = logits_TV.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf)
        expected = logits_TV.log_softmax(-1)[range(len(completion.token_ids)), completion.token_ids]
        assert len(completion.logprobs) == len(completion.token_ids)
        if top_p == 1 or served.tolerance < 1e-3:  # in bfloat16 the edge of the nucleus is another
            assert torch.tensor(completion.logprobs).sub(expected).abs().max() < 2 * served.tolerance
    without = served.engine.generate(requests, Decoding(max_tokens=12, temperature=temperature, top_p=top_p))
    assert [c.token_ids for c in without] == [c.token_ids for c in completions]
    assert {c.logprobs for c in without} == {()}


def test_a_completion_ends_with_the_token_that_ended_it(served: Served) -> None:
    """The end-of-text token or the stop string's: it has a log-probability too, and nothing comes after it."""
    decoding = Decoding(max_tokens=60, temperature=1.5, stop=("e", "4"), logprobs=True)
    requests = [Request(prompt_ids=PROMPTS[i % 3], seed=i) for i in range(24)]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served.model_dir)
    ended = 0
    for completion in served.engine.generate(requests, decoding):
        texts = [tokenizer.decode([token]) for token in completion.token_ids]
        ends = [token == tokenizer.eos_token_id or "e" in text or "4" in text
                for token, text in zip(completion.token_ids, texts, strict=True)]  # fmt: skip
        assert not any(ends[:-1])
        # Cut off is what neither such a token ended nor another one that marks the end of a turn.
        assert completion.truncated != (ends[-1] or TextRules(tokenizer).turn(completion.token_ids)[1])
        assert len(completion.logprobs) == len(completion.token_ids)
        ended += ends[-1]
    assert ended > 12
