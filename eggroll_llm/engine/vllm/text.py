"""What vLLM is asked for, and token ids -> text, with the rule that ends a completion.

A stop string of one ASCII character ends a completion exactly when a token with that character appears, which the
engine can see from the token id alone. Longer ones may straddle tokens, so that the engine has to detokenise.

Special tokens are no part of the text, except tags of thoughts, which graders need. One that ends a turn, or begins the
next one, ends the text: without it, what a model invents after its answer would run together with the answer.
"""

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

from vllm import RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind

from eggroll_llm.engine.interface import Completion, Decoding, Request
from eggroll_llm.engine.vllm.sampler import seed_argument, thought_argument
from eggroll_llm.errors import EngineError
from eggroll_llm.tasks.chat import thought_tags
from rewards.turns import THOUGHT, TURN_END, TURN_START


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    return text[: min((at for string in stop if (at := text.find(string)) >= 0), default=len(text))]


class TextRules:
    """A tokenizer's view of stop strings and completions."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids_with = cache(self._find_ids_with)

    def stop_token_ids(self, stop: Sequence[str]) -> list[int] | None:
        """Return the tokens that end a completion, or None when token ids alone cannot tell."""
        if any(len(string) != 1 or not string.isascii() for string in stop):
            return None
        return sorted({token_id for string in stop for token_id in self._ids_with(string)})

    def turn(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """Return the text of the first turn, and whether a special token shows where it ends."""
        for i, token_id in enumerate(token_ids):
            # Before any text, a token that begins a turn begins this one.
            if token_id in self._ends or (token_id in self._starts and self._text(token_ids[:i]).strip()):
                return self._text(token_ids[:i]), True
        return self._text(token_ids), False

    def _text(self, token_ids: Sequence[int]) -> str:
        pieces, start = [], 0
        for i, token_id in enumerate(token_ids):
            if tag := self._thoughts.get(token_id):
                pieces += [self._decode(token_ids[start:i]), tag]
                start = i + 1
        return "".join([*pieces, self._decode(token_ids[start:])])

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    @cached_property
    def _special(self) -> dict[int, str]:
        added = getattr(self._tokenizer, "added_tokens_decoder", {})  # mistral-common's has none
        return {token_id: token.content for token_id, token in added.items() if token.special}

    @cached_property
    def _ends(self) -> set[int]:
        ends = {token_id for token_id, content in self._special.items() if TURN_END.fullmatch(content)}
        return ends | {self._tokenizer.eos_token_id}

    @cached_property
    def _starts(self) -> set[int]:
        starts = {token_id for token_id, content in self._special.items() if TURN_START.fullmatch(content)}
        return (starts | {self._tokenizer.bos_token_id}) - self._ends

    @cached_property
    def _thoughts(self) -> dict[int, str]:
        return {token_id: content for token_id, content in self._special.items() if THOUGHT.fullmatch(content)}

    @cached_property
    def thought_tags(self) -> dict[int, int]:
        """Return the tokens that open a thought, each with the one that closes it."""
        return thought_tags(self._tokenizer)

    def _find_ids_with(self, character: str) -> list[int]:
        ids = range(len(self._tokenizer))
        texts = self._tokenizer.batch_decode([[token_id] for token_id in ids])
        return [token_id for token_id, text in zip(ids, texts, strict=True) if character in text]


def sampling_params(decoding: Decoding, rules: TextRules, *, own_sampler: bool) -> Callable[[Request], SamplingParams]:
    """Return what makes a request's parameters; with `own_sampler` the seed goes where `sampler` looks for it."""
    stop_ids = None if decoding.special_tokens else rules.stop_token_ids(decoding.stop)
    budget = decoding.thinking_token_budget
    extra = thought_argument(rules.thought_tags, budget) if budget else {}
    common: dict[str, Any] = {
        "max_tokens": decoding.max_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "top_k": decoding.top_k,
        "min_p": decoding.min_p,
        "repetition_penalty": decoding.repetition_penalty,
        "output_kind": RequestOutputKind.FINAL_ONLY,
        "ignore_eos": decoding.ignore_eos,
        "logprobs": 0 if decoding.logprobs else None,  # of the sampled token, and of no other
    }
    if stop_ids is None:
        common |= {
            "stop": list(decoding.stop),
            "skip_special_tokens": not decoding.special_tokens,
            "spaces_between_special_tokens": False,
        }
    else:
        common |= {"stop_token_ids": stop_ids, "detokenize": False}
    if decoding.temperature == 0:
        params = SamplingParams(**common, extra_args=extra)
        return lambda request: params
    if own_sampler:
        return lambda request: SamplingParams(**common, extra_args=extra | seed_argument(request.seed))
    return lambda request: SamplingParams(**common, extra_args=extra, seed=request.seed)


def completion(output: RequestOutput, decoding: Decoding, rules: TextRules) -> Completion:
    """Return what a finished request was answered. Raises EngineError when vLLM gave it up."""
    (sample,) = output.outputs
    reason, generated = sample.finish_reason, len(sample.token_ids)
    if reason in ("abort", "error"):
        raise EngineError(f"the inference engine gave up a request after {generated} tokens ({reason})")
    text, ended = (sample.text, False) if decoding.special_tokens else rules.turn(sample.token_ids)
    return Completion(
        text=before_stop(text, decoding.stop),
        token_ids=tuple(sample.token_ids),
        truncated=not ended and (reason == "length" or (reason is None and generated >= decoding.max_tokens)),
        prompt_tokens=len(output.prompt_token_ids or ()),
        logprobs=tuple(
            at[token_id].logprob
            for token_id, at in zip(sample.token_ids, sample.logprobs or (), strict=decoding.logprobs)
        ),
    )
