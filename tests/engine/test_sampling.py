"""What each setting of sampling does, next to the logits of transformers: a tiny float32 model, one start for all.

Its tokenizer has tags of thoughts, and the engine so little memory that long answers are preempted.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from torch import Tensor

from eggroll_llm.config.schema import EngineConfig, SamplingConfig
from eggroll_llm.engine.interface import Completion, Request
from eggroll_llm.engine.sampling import decoding_of
from eggroll_llm.engine.vllm.engine import VllmEngine
from eggroll_llm.engine.vllm.text import before_stop

pytestmark = pytest.mark.vllm

REQUESTS = [Request(prompt_ids=tuple((7 * i + j) % 300 + 3 for j in range(9 + i)), seed=i) for i in range(12)]


class Served:
    def __init__(self, model_dir: Path, thinker: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        tokenizer.add_tokens([AddedToken(tag, special=False) for tag in ("<think>", "</think>")])
        self.open, self.close = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        self.model.save_pretrained(thinker)
        tokenizer.save_pretrained(thinker)
        config = EngineConfig(dtype="float32", kv_cache_gib=0.0009, slots=1, max_sequences=8, max_model_len=192)
        self.engine = VllmEngine(thinker, config, thinking=True)

    def answers(self, requests: Sequence[Request] = REQUESTS, **sampling: Any) -> list[Completion]:
        """Answers of 20 tokens unless they end before, and with `max_tokens` in any case."""
        decoding = decoding_of(SamplingConfig(**{"max_tokens": 20, **sampling}), ())
        return self.engine.generate(requests, dataclasses.replace(decoding, ignore_eos="max_tokens" in sampling))

    def logits(self, completion: Completion, request: Request) -> Tensor:
        """[tokens, vocabulary], each before its token."""
        ids = request.prompt_ids + completion.token_ids
        with torch.no_grad():
            logits_TV: Tensor = self.model(torch.tensor([ids])).logits[0, len(request.prompt_ids) - 1 : -1]
        return logits_TV

    def ranks(self, completions: list[Completion]) -> Tensor:
        """How many tokens were more probable than each that was drawn."""
        ranks = []
        for completion, request in zip(completions, REQUESTS, strict=True):
            logits_TV, drawn_T = self.logits(completion, request), torch.tensor(completion.token_ids)
            ranks.append((logits_TV > logits_TV.gather(1, drawn_T[:, None])).sum(1))
        return torch.cat(ranks)

    def shares(self, completions: list[Completion], temperature: float) -> Tensor:
        """Probability of each token that was drawn, as a fraction of the most probable one's."""
        shares = []
        for completion, request in zip(completions, REQUESTS, strict=True):
            probs_TV = (self.logits(completion, request) / temperature).softmax(-1)
            drawn_T = torch.tensor(completion.token_ids)
            shares.append(probs_TV.gather(1, drawn_T[:, None])[:, 0] / probs_TV.max(-1).values)
        return torch.cat(shares)


@pytest.fixture(scope="module")
def served(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tiny_model("llama"), tmp_path_factory.mktemp("thinker"))
    yield served
    served.engine.close()


def test_top_k_keeps_the_most_probable(served: Served) -> None:
    assert served.ranks(served.answers(temperature=2.0)).max() > 3
    assert served.ranks(served.answers(temperature=2.0, top_k=3)).unique().tolist() == [0, 1, 2]
    assert served.answers(temperature=2.0, top_k=1) == served.answers()


def test_min_p_keeps_what_is_nearly_as_probable(served: Served) -> None:
    """At the temperature that is drawn at."""
    assert served.shares(served.answers(temperature=2.0), 2.0).min() < 0.4
    shares = served.shares(served.answers(temperature=2.0, min_p=0.5), 2.0)
    assert shares.min() >= 0.499
    assert (shares < 0.99).any()


def test_a_penalty_divides_what_has_been(served: Served) -> None:
    """Also in greedy decoding: positive logits of tokens in prompt and answer are divided, negative ones multiplied."""
    penalised = served.answers(repetition_penalty=1.5)
    assert penalised != served.answers()
    for completion, request in zip(penalised, REQUESTS, strict=True):
        for i, logits_V in enumerate(served.logits(completion, request)):
            seen = torch.tensor(sorted({*request.prompt_ids, *completion.token_ids[:i]}))
            logits_V[seen] = torch.where(logits_V[seen] > 0, logits_V[seen] / 1.5, logits_V[seen] * 1.5)
            assert logits_V.max() - logits_V[completion.token_ids[i]] < 1e-3


def test_stop_ends_an_answer_before_it(served: Served) -> None:
    free = served.answers()
    texts = (free[0].text[3], free[1].text[4:6])
    for stop in (texts[:1], texts):  # a character by its token ids, a longer text by detokenising
        assert [stopped.text for stopped in served.answers(stop=stop)] == [before_stop(a.text, stop) for a in free]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_thought_that_has_taken_its_budget_is_closed(
    served: Served, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There and nowhere else, in thoughts that prompt or answer opens, whatever rows a request is in and however often
    it is preempted."""
    scheduler = served.engine._llm.engine_core.engine_core.scheduler
    preempted, preempt = list[str](), scheduler._preempt_request

    def note(request: Any, *arguments: Any, **keywords: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *arguments, **keywords)

    monkeypatch.setattr(scheduler, "_preempt_request", note)
    ends = ((served.open,), (), (served.open, 9, served.close), (served.close, served.open, 9))
    requests = [
        dataclasses.replace(request, prompt_ids=request.prompt_ids + ends[i % 4]) for i, request in enumerate(REQUESTS)
    ]
    free = served.answers(requests, max_tokens=120, temperature=temperature)
    forced = opened = 0
    for budget in (1, 30):
        limited = served.answers(requests, max_tokens=120, temperature=temperature, thinking_token_budget=budget)
        for i, (completion, unlimited) in enumerate(zip(limited, free, strict=True)):
            inside, spent, same = i % 4 in (0, 3), 0, True
            opened += not inside and served.open in completion.token_ids
            for token, other in zip(completion.token_ids, unlimited.token_ids, strict=True):
                if inside and spent == budget:
                    assert token == served.close
                    forced += 1
                    same &= other == token
                elif same:
                    assert token == other
                spent += inside and token != served.close
                inside = token != served.close if inside else token == served.open
    assert forced > 10
    assert opened > 0
    assert preempted
