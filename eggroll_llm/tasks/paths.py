"""Paths in settings: those of a recipe begin at its folder, those of a flag or from Python where one stands."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eggroll_llm.config.flags import key_of, toml_value
from eggroll_llm.config.toml import format_value
from eggroll_llm.tasks.dataset.source import is_path

PATH_OPTIONS = {
    "countdown": ("file", "test_file"),
    "gsm8k": ("data_dir",),
    "gsm8k_cot": ("data_dir",),
    "dataset": ("dataset", "test_file"),
    "verifiers": ("environment",),
}
"""Options that are paths, relative to the recipe's folder; `dataset` and `environment` may be names instead."""


def absolute_settings(settings: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return flags with the paths in them resolved against the working directory."""
    return [(flag, absolute_setting(flag, text)) for flag, text in settings]


def absolute_setting(flag: str, text: str) -> str:
    """Return the text of a flag with the paths in it resolved against the working directory."""
    if text.startswith("[") and key_of(flag).startswith("task_options."):
        return format_value(absolute_value(flag, toml_value(text), Path.cwd()))
    return str(absolute_value(flag, text, Path.cwd()))


def absolute_value(key: str, value: Any, folder: Path) -> Any:
    """Return the value of a setting with the paths in it resolved against a folder."""
    table, _, option = key_of(key).partition(".")
    if table == "task_options":
        return absolute_option(option, value, folder)
    if not isinstance(value, str):
        return value
    if (table, option) == ("task", ""):
        return absolute_task(value, folder)
    if (table, option) == ("chat", "template_file") and value:
        return _absolute(value, folder)
    return value


def absolute_task(task: str, folder: Path) -> str:
    """Return a task with the path of its file, if it is the user's own, resolved against a folder."""
    path, separator, name = task.rpartition(":")
    return f"{_absolute(path, folder)}:{name}" if separator and path.endswith(".py") else task


def absolute_option(key: str, value: Any, base_dir: Path) -> Any:
    """Return the value of an option that is a path, or has paths in it, with these resolved against a folder."""
    if isinstance(value, list | tuple):
        return [absolute_option(key, item, base_dir) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if key == "rewards":
        path, _, name = value.rpartition(":")
        return f"{_absolute(path, base_dir)}:{name}" if path.endswith(".py") else value
    if key == "environment":
        return _absolute(value, base_dir) if value.endswith(".py") else value
    if key not in {option for options in PATH_OPTIONS.values() for option in options}:
        return value
    if key == "dataset" and not is_path(value, base_dir):
        return value
    return _absolute(value, base_dir)


def _absolute(path: str, folder: Path) -> str:
    """Return a path resolved against a folder; links in it stay, as what they point to may change."""
    return os.path.abspath(folder / os.path.expanduser(path))
