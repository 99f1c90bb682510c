"""Tasks: what is trained on, how it is asked, and which grader decides."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eggroll_llm.config import parse_table
from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.base import Message, Problem, Split, Task, check_golds
from eggroll_llm.tasks.countdown import CountdownOptions, load_countdown
from eggroll_llm.tasks.gsm8k import Gsm8kOptions, load_gsm8k
from eggroll_llm.tasks.user import load_user_task
from rewards import Score

__all__ = ["PATH_OPTIONS", "Message", "Problem", "Score", "Split", "Task", "check_golds", "load_task"]

PATH_OPTIONS = {"countdown": ("file", "test_file"), "gsm8k": ("data_dir",), "gsm8k_cot": ("data_dir",)}
"""Options that are paths, relative to the recipe's folder."""


def load_task(name: str, options: Mapping[str, Any], *, base_dir: Path, source: str = "task_options") -> Task:
    """The task `name` with its problems loaded and the gold answer of every one checked.

    Args:
        name: "countdown", "gsm8k", or "path/to/file.py:NAME".
        base_dir: folder that paths are relative to, the recipe's.
        source: where the options come from, for messages.

    Raises:
        ConfigError: an unknown option, or one of the wrong type.
        TaskError: anything else that is wrong with the options, the data or the user's file.
    """
    task: Task
    if name == "countdown":
        task = load_countdown(parse_table(CountdownOptions, options, where="task_options", source=source), base_dir)
    elif name == "gsm8k":
        task = load_gsm8k(parse_table(Gsm8kOptions, options, where="task_options", source=source), base_dir)
    elif ":" in name:
        task = load_user_task(name, options, base_dir)
    else:
        nearest = difflib.get_close_matches(name, ["countdown", "gsm8k"], n=1)
        hint = f' Did you mean "{nearest[0]}"?' if nearest else ""
        raise TaskError(f'task = "{name}" is not known. Valid: "countdown", "gsm8k", or "file.py:NAME".{hint}')
    check_golds(task)
    return task
