"""The words of a command line: what is done before argparse sees them, and how several commands read theirs.

Settings (`--es.sigma 0.003`) are split off, and slips get hints: argparse alone would take the value of a setting for
the recipe where the setting stands first, and could not tell a misspelt flag from a setting.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from eggroll_llm.config.flags import FREE, key_of, whole_number
from eggroll_llm.config.hints import did_you_mean
from eggroll_llm.config.parse import unknown_key
from eggroll_llm.errors import ConfigError
from eggroll_llm.system.invocation import command as command_line

Settings = list[tuple[str, str]]
GO_ON = "the same command continues where this one stopped"
"""Follows the interruption of a command whose results so far are on disk."""
SETTINGS = "setting_keys"
"""Default of a command's parser: a function that lists the dotted keys of the settings that it takes, or None."""
_ONE_DASH = re.compile(r"-[A-Za-z]{2}[\w.-]*")
_ASSIGNMENT = re.compile(r"\+*([A-Za-z_][\w.]*)=(.*)", re.DOTALL)
_YES_OR_NO = ("true", "false", "yes", "no", "on", "off", "1", "0")


def split(
    words: Sequence[str], program: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser]
) -> tuple[list[str], Settings]:
    """Return the words for argparse, and the (flag, text) pairs of settings.

    Raises:
        ConfigError: an unknown command or flag, a setting without value, or a word that is neither.
    """
    if not words or words[0] in program._option_string_actions:
        return list(words), []
    name, *others = words
    if name not in commands:
        raise _unknown_command(name, others, program, commands)
    own, keys = commands[name]._option_string_actions, commands[name].get_default(SETTINGS)
    rest, settings, pending = [name], [], iter(others)
    for word in pending:
        flag, equals, text = word.partition("=")
        if word == "--":
            rest += [word, *pending]
        elif flag in own:
            rest += [word, *_value(own[flag], equals, pending)]
        elif keys and word.startswith("--"):
            _check_flag(flag, own, keys())
            settings.append((flag, text if equals else _text(flag, pending)))
        elif word.startswith("--") or _ONE_DASH.fullmatch(flag):
            raise _unknown_flag(flag, own, keys)
        elif keys and len(rest) > 1 and (found := _ASSIGNMENT.fullmatch(word)):
            raise ConfigError(f"{word!r} is neither a flag nor the value of one. Write --{found[1]} {found[2]}.")
        else:
            rest.append(word)
    return rest, settings


def check_no_rest(rest: Sequence[str], takes_settings: bool) -> None:
    """Raise ConfigError for words that argparse had no use for."""
    if rest and rest[0].lower() in _YES_OR_NO:
        raise ConfigError(f"{rest[0]!r} is not expected here: flags such as --dry-run take no value, leave it out")
    if rest:
        form = "settings are --KEY VALUE" if takes_settings else "this command takes no more words"
        raise ConfigError(f"{rest[0]!r} is neither a flag nor the value of one; {form}")


def _value(action: argparse.Action, equals: str, pending: Iterator[str]) -> list[str]:
    """Return the next word, where the flag takes one; argparse says so where it is another flag or none."""
    if equals or action.nargs == 0:
        return []
    word = next(pending, None)
    return [] if word is None else [word]


def _text(flag: str, pending: Iterator[str]) -> str:
    text = next(pending, None)
    if text is None or text.startswith("--"):
        raise ConfigError(f"{flag} has no value; write {flag} {_kind(flag)}")
    return text


def _kind(flag: str) -> str:
    """Return what to write after a flag: its choices, or VALUE."""
    from eggroll_llm.config.help import field_help
    from eggroll_llm.config.schema import RunConfig

    kinds = {row.key: row.kind for row in field_help(RunConfig)}
    kind = kinds.get(key_of(flag), "")
    return kind.replace("|", " or ") if "|" in kind else "VALUE"


def _check_flag(flag: str, own: Mapping[str, object], keys: Sequence[str]) -> None:
    """Raise ConfigError for an unknown setting; keys of a free table may be anything."""
    key = key_of(flag)
    tables = {known.rpartition(".")[0] for known in keys}
    if not (key in keys or key in tables or key.startswith(FREE)):
        raise _unknown_flag(flag, own, lambda: keys)


def _unknown_flag(flag: str, own: Mapping[str, object], keys: Callable[[], Sequence[str]] | None) -> ConfigError:
    flags = [name.removeprefix("--") for name in own if name.startswith("--") and name != "--help"]
    return unknown_key(flag.lstrip("-"), [*(keys() if keys else ()), *flags], flag, dash="--")


def _unknown_command(
    name: str, others: Sequence[str], program: argparse.ArgumentParser, commands: Mapping[str, object]
) -> ConfigError:
    if name.startswith("-"):
        return _unknown_flag(name, program._option_string_actions, None)
    hint = did_you_mean(name, commands)
    if name.endswith(".toml"):
        hint = f" Did you mean: {command_line('train', name, *others)}"
    hint = hint or f" Commands: {', '.join(commands)}."
    return ConfigError(f"{name!r} is not a command.{hint}")


def add_at(parser: argparse.ArgumentParser) -> None:
    """Declare --at, which chooses the step of a run."""
    parser.add_argument(
        "--at", default="final", metavar="STEP", help="step of a run: final (default), best or a number"
    )


def positive(text: str) -> int:
    """Return a whole number of at least 1, for argparse."""
    return _whole(text, 1, "must be at least 1")


def not_negative(text: str) -> int:
    """Return a whole number of at least 0, for argparse."""
    return _whole(text, 0, "must not be negative")


def positives(text: str) -> list[int]:
    """Return whole numbers of at least 1, with commas between them, for argparse."""
    return [positive(number) for number in text.split(",")]


def _whole(text: str, least: int, limit: str) -> int:
    value = whole_number(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"{text}: not a whole number")
    if value < least:
        raise argparse.ArgumentTypeError(f"{text}: {limit}")
    return value
