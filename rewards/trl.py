"""Graders in TRL's signature: f(prompts, completions, **columns) -> list of float.

TRL passes every further column of its data set as a keyword argument, one value per completion:

    trainer = GRPOTrainer(..., reward_funcs=reward_function(rewards.countdown.score, use_all=True))

with columns `numbers` and `target`. Completions are texts or, for conversational data sets, lists of
messages whose last one is graded. Extra columns, and TRL's own arguments, are ignored.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.score import Score
from rewards.turns import ends_in_thought

Completion = str | Sequence[Mapping[str, Any]]


def reward_function(score: Callable[..., Score], **options: Any) -> Callable[..., list[float]]:
    """Adapt a grader `score(completion, column, ..., **options)`.

    A grader with the argument `thought_open` gets it from the prompt: whether the text, or the last message if it is
    the assistant's, ends in a thought. TRL does not show what a chat template adds; if that opens a thought, pass
    `thought_open=True`.

    The parameters of `score` after the completion that have no default, and are not among `options`, are the
    columns. The function is named after the module of `score`; TRL logs it under that name.

    Raises:
        ValueError: from the returned function, when a column is missing or not one value per completion.
    """
    names = _columns(score, options)
    asks = "thought_open" in inspect.signature(score).parameters and "thought_open" not in options

    def reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float]:
        missing = [name for name in names if name not in columns]
        if missing:
            raise ValueError(f"{reward.__name__} needs the column {missing[0]!r}. Columns: {list(columns)}.")
        for name in names:
            if len(columns[name]) != len(completions):
                raise ValueError(f"Column {name!r} has {len(columns[name])} values for {len(completions)} completions.")
        rows = [{name: columns[name][i] for name in names} for i in range(len(completions))]
        if asks:
            for row, prompt in zip(rows, prompts, strict=True):
                row["thought_open"] = ends_in_thought(_begun(prompt))
        return [
            score(text_of(completion), **row, **options).reward
            for completion, row in zip(completions, rows, strict=True)
        ]

    reward.__name__ = f"{score.__module__.rpartition('.')[2]}_reward"
    return reward


def text_of(completion: Completion) -> str:
    """Return the text of a completion: itself, or the content of its last message, whose text parts are joined."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, str) or not content:
        return content or ""
    return "".join(part.get("text") or "" for part in content)


def _begun(prompt: Any) -> str:
    """Return the part of a prompt that the completion continues."""
    if isinstance(prompt, str):
        return prompt
    return text_of(prompt) if prompt and prompt[-1].get("role") == "assistant" else ""


def _columns(score: Callable[..., Score], options: Mapping[str, Any]) -> list[str]:
    parameters = list(inspect.signature(score).parameters.values())[1:]
    return [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in options
    ]
