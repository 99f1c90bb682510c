"""A task's name and options -> the task, with its problems loaded and checked."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eggroll_llm.config.parse import parse_table
from eggroll_llm.config.schema import RewardConfig
from eggroll_llm.config.toml import Sourced, format_value
from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.countdown import CountdownOptions, load_countdown
from eggroll_llm.tasks.dataset.load import load_dataset
from eggroll_llm.tasks.dataset.options import DatasetOptions
from eggroll_llm.tasks.gsm8k import Gsm8kOptions, load_gsm8k
from eggroll_llm.tasks.sandbox.pool import ScorePool
from eggroll_llm.tasks.task import Task, check_golds
from eggroll_llm.tasks.user import load_user_task
from eggroll_llm.tasks.verifiers.load import load_verifiers
from eggroll_llm.tasks.verifiers.options import VerifiersOptions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Options = TypeVar("Options", bound=DataclassInstance)

NAMES = ("countdown", "gsm8k", "dataset", "verifiers")


def load_task(name: str, options: Mapping[str, Any], *, base_dir: Path, limits: RewardConfig | None = None) -> Task:
    """Return the task `name` with its problems loaded and the gold answer of every one checked.

    Args:
        name: "countdown", "gsm8k", "dataset", "verifiers", or "path/to/file.py:NAME".
        options: those of a recipe know their file and lines.
        base_dir: folder that paths are relative to, the recipe's.
        limits: of the processes in which a user's code, or another grader that may hang, grades the gold answers.

    Raises:
        ConfigError: an unknown option, or one of the wrong type.
        TaskError: anything else that is wrong with the options, the data or the user's file.
    """
    limits = limits or RewardConfig()
    sourced = options if isinstance(options, Sourced) else Sourced(options)

    def place(option: str) -> str:
        return sourced.origin_of(option).at(f"task_options.{option}")

    task: Task
    if name == "countdown":
        task = load_countdown(_parse(CountdownOptions, sourced), base_dir, place)
    elif name == "gsm8k":
        task = load_gsm8k(_parse(Gsm8kOptions, sourced), base_dir, place)
    elif name == "dataset":
        return load_dataset(_parse(DatasetOptions, sourced), base_dir, place, limits)
    elif name == "verifiers":
        return load_verifiers(_parse(VerifiersOptions, sourced), base_dir, place, limits)
    elif ":" in name:
        task = user_task = load_user_task(name, options, base_dir, place)
        with ScorePool(user_task, limits) as pool:
            check_golds(task, lambda golds: pool.judge(golds, voted=False))
        return task
    else:
        nearest = difflib.get_close_matches(name, NAMES, n=1)
        hint = f' Did you mean "{nearest[0]}"?' if nearest else ""
        raise TaskError(
            f'task = "{name}" is not known. Valid: {", ".join(map(format_value, NAMES))}, or "file.py:NAME".{hint}'
        )
    check_golds(task)
    return task


def _parse(kind: "type[Options]", options: Sourced) -> "Options":
    """Return the options of a built-in task; each is parsed by itself first, as each may come from elsewhere."""
    for key, value in options.items():
        parse_table(kind, {key: value}, options.origin_of(key), where="task_options")
    return parse_table(kind, options, options.origin, where="task_options")
