"""Checks how a user's object will be called, before the engine starts."""

import inspect
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.task import Place

_CALLS = {
    "problems": ("split",),
    "prompt": ("problem",),
    "score": ("completion", "problem"),
    "score_batch": ("completions", "problems"),
    "gold": ("problem",),
    "answer": ("completion",),
    "kind": ("problem",),
}
"""Methods of a task and what each is called with."""
_OPTIONAL = ("gold", "answer", "kind", "score_batch")
NEEDED = "A task needs problems(split), prompt(problem), score(completion, problem)"
_PAGE = "See docs/your_own_reward.md"


def check_calls(inner: Any, where: str) -> None:
    """Raise TaskError when a method of the user's object is missing, or does not take what it will be called with."""
    for name, arguments in _CALLS.items():
        if not hasattr(inner, name):
            if name in _OPTIONAL or (name == "score" and hasattr(inner, "score_batch")):
                continue
            raise TaskError(f"{where} has no method {name}. {NEEDED}.")
        method = getattr(inner, name)
        if not callable(method):
            remedy = f"Write def {name}(self, {', '.join(arguments)})" + (
                ", or remove it." if name in _OPTIONAL else "."
            )
            raise TaskError(f"{where}: {name} = {method!r:.60} is not a method. {remedy}")
        _check_call(method, name, arguments, where)


def optional_arguments(score: Any) -> frozenset[str]:
    """Return which of `truncated` and `thought_open` a score has; one that takes any gets `truncated`."""
    if (signature := _signature(score)) is None:
        return frozenset()
    anything = {"truncated"} if _takes_any(signature) else set()
    return frozenset(({"truncated", "thought_open"} & signature.parameters.keys()) | anything)


def check_factory(factory: Any, options: Mapping[str, Any], name: str, place: Place) -> None:
    """Raise TaskError when a user's class or function does not make a task of these options."""
    if (signature := _signature(factory)) is None:  # the call itself decides
        return
    if _is_trl(signature) and not isinstance(factory, type):
        path, _, function = name.rpartition(": ")
        raise TaskError(f"{name}{signature} is a TRL reward function, not a task. {_as_reward(path, function)}")
    try:
        signature.bind(**options)
    except TypeError as error:
        if options:
            key = next((key for key in options if key not in signature.parameters), next(iter(options)))
            raise TaskError(f"{place(key)}: {name} does not accept task_options {dict(options)}: {error}.") from error
        if not isinstance(factory, type):
            raise TaskError(
                f"{name}{signature} is a function that cannot be called without task_options: {error}. {NEEDED}: put "
                f"score into a class with the other methods. {_PAGE}."
            ) from error
        raise TaskError(f"{name}{signature} needs task_options: {error}. Set it in [task_options].") from error


def _check_call(method: Any, name: str, arguments: tuple[str, ...], where: str) -> None:
    call = f"{name}({', '.join(arguments)})"
    if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
        raise TaskError(f"{where}: {name} is asynchronous, and is called as {call} without await. Write def {name}.")
    if name != "problems" and inspect.isgeneratorfunction(method):
        raise TaskError(f"{where}: {name} yields, and is called as {call}. Return its value.")
    if (signature := _signature(method)) is None:
        return
    options = dict.fromkeys(optional_arguments(method), False) if name.startswith("score") else {}
    fault = ""
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        fault = f"cannot be called as {call}: {error}"
    else:
        first = tuple(signature.parameters)[: len(arguments)]
        if first != arguments and sorted(first) == sorted(arguments):
            fault = f"takes its arguments in a different order from {call}"
    if name == "score" and _is_trl(signature) and (fault or _is_for_columns(signature)):
        path = where.rpartition(": ")[0]
        raise TaskError(
            f"{where}: score{signature} is a TRL reward function. Move it out of the class as reward. "
            f"{_as_reward(path, 'reward')}"
        )
    if fault:
        known = 'Everything else is in the problem: problem["answer"]. ' if "problem" in arguments else ""
        raise TaskError(
            f"{where}: {name}{signature} {fault}. {known}Write def {name}(self, {', '.join(arguments)}) in a class."
        )


def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some callables in C have none
        return None


def _takes_any(signature: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _is_trl(signature: inspect.Signature) -> bool:
    """Return whether it is called like reward(completions, **columns), each a list."""
    return "completions" in signature.parameters


def _is_for_columns(signature: inspect.Signature) -> bool:
    """Return whether such a function expects something else than a completion and a problem."""
    names = list(signature.parameters)
    return names[0] != "completions" or (_takes_any(signature) and "problem" not in names)


def _as_reward(path: str, function: str) -> str:
    """Return how a recipe names a reward function of TRL."""
    return (
        f'Name it as a reward: task = "dataset", and in [task_options] dataset = "DATA" and rewards = '
        f'"{PurePath(path).name}:{function}". See docs/coming_from_trl.md.'
    )
