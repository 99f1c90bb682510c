"""What several commands share: numbers as argument types, paths, a sentence."""

import argparse
import os
from pathlib import Path

from eggroll_llm.config.flags import toml_value, whole_number
from eggroll_llm.config.toml import format_value

GO_ON = "the same command continues where this one stopped"
"""Follows the interruption of a command whose results so far are on disk."""


def positive(text: str) -> int:
    """Return a whole number of at least 1, for argparse."""
    return _whole(text, 1, "must be at least 1")


def not_negative(text: str) -> int:
    """Return a whole number of at least 0, for argparse."""
    return _whole(text, 0, "must not be negative")


def _whole(text: str, least: int, limit: str) -> int:
    value = whole_number(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"{text}: not a whole number")
    if value < least:
        raise argparse.ArgumentTypeError(f"{text}: {limit}")
    return value


def absolute_setting(flag: str, text: str) -> str:
    """Return the text of a flag with the paths in it resolved against the working directory."""
    from eggroll_llm.tasks.load import absolute_option

    if flag == "--task":
        return absolute_task(text)
    table, _, key = flag[2:].replace("-", "_").partition(".")
    if (table, key) == ("chat", "template_file"):
        return os.path.abspath(os.path.expanduser(text)) if text else text
    if table != "task_options":
        return text
    if text.startswith("["):
        return format_value(absolute_option(key, toml_value(text), Path.cwd()))
    return str(absolute_option(key, text, Path.cwd()))


def absolute_task(task: str) -> str:
    """Return a task with the path of its file, if it is the user's own, resolved against the working directory.

    In a recipe such a path is relative to the recipe's folder.
    """
    path, separator, name = task.rpartition(":")
    return f"{os.path.abspath(path)}:{name}" if separator and path.endswith(".py") else task
