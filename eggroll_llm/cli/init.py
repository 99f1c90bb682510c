"""`init`: write a task in Python, or a recipe for a data set, to start from. Nothing that exists is overwritten."""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eggroll_llm.cli.arguments import Settings
from eggroll_llm.config.toml import format_value
from eggroll_llm.errors import ConfigError, TaskError
from eggroll_llm.system.invocation import command

_TASK = '''\
"""Sums of two numbers: a task for eggroll-llm, to be changed into yours.

    {dry}
    {train}
"""

EXAMPLES = "23 + 45 = 68\\n81 + 17 = 98\\n"


class Task:
    stop = ("\\n",)  # where an answer ends

    def problems(self, split):  # dicts with whatever you like, the same ones each time
        pairs = [{{"a": a, "b": b}} for a in range(10, 100) for b in range(10, 100)]
        return pairs[::32] if split == "test" else pairs[1::2]

    def prompt(self, problem):  # a text to complete, or a list of chat messages
        return f"{{EXAMPLES}}{{problem['a']}} + {{problem['b']}} ="

    def score(self, completion, problem):  # a number; accuracy counts the answers with 1 or more
        answer = completion.strip()
        if answer == str(problem["a"] + problem["b"]):
            return 1.0
        return 0.1 if answer.isdigit() else 0.0

    def gold(self, problem):  # optional: an answer that must score 1, checked at the start
        return f" {{problem['a'] + problem['b']}}"
'''
_RECIPE = """\
{task}

[sampling]
max_tokens = {max_tokens}

[es]                       # these depend on the model: try a third and three times as much
sigma = {sigma}
learning_rate = {learning_rate}
"""
_FIRST_LINES = """\
model = "smollm2-135m-instruct"
task = {task}
steps = 20"""
_ASKING = {
    "gsm8k": "Think step by step. Then write the answer on a last line of its own, as #### and the number alone.",
    "math": "Think step by step. Put the final answer in \\boxed{}.",
    "exact": "Answer with the result alone.",
    "choice": "Answer with the letter alone.",
    "countdown": "Give an expression that uses {nums} and equals {target}, between <answer> and </answer>.",
}
_MAX_TOKENS = {"gsm8k": 320, "math": 512, "countdown": 320}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("file", type=Path, metavar="FILE", help="my_task.py, or with --dataset my_recipe.toml")
    parser.add_argument("--dataset", metavar="DATA", help="file or folder of data, or a name on the hub")
    parser.add_argument("--subset", metavar="NAME", default="", help="configuration of a hub data set, such as main")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Write the files and print how to go on."""
    file: Path = options.file
    wanted = ".toml" if options.dataset else ".py"
    if file.suffix != wanted:
        other = " With --dataset DATA it writes a recipe." if file.suffix == ".toml" else ""
        raise ConfigError(f"{file}: name a file that ends with {wanted}.{other}")
    recipe = file.with_suffix(".toml")
    if options.subset and not options.dataset:
        raise ConfigError("--subset belongs to --dataset: leave it out")
    if options.dataset:
        texts = {recipe: _dataset_recipe(options.dataset, options.subset, recipe)}
    else:
        first = _FIRST_LINES.format(task=format_value(f"{file.name}:Task"))
        starts = {"dry": command("train", recipe.name, "--dry-run"), "train": command("train", recipe.name)}
        texts = {
            file: _TASK.format(**starts),
            recipe: _RECIPE.format(task=first, max_tokens=6, sigma=0.012, learning_rate=0.0015),
        }
    _write(texts)
    print(f"wrote {' and '.join(map(str, texts))}")
    print(f"check: {command('train', recipe, '--dry-run')}")
    print(f"train: {command('train', recipe)}")
    return 0


def _write(texts: Mapping[Path, str]) -> None:
    if existing := [path for path in texts if path.exists()]:
        raise ConfigError(f"{existing[0]}: exists already. Name another file, or remove it first.")
    for path, text in texts.items():
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror}). Name another file.") from error


def _dataset_recipe(dataset: str, subset: str, recipe: Path) -> str:
    """Return a recipe with the columns and the grader that the data suggest."""
    from eggroll_llm.tasks.dataset.columns import CHOICES, find_columns, lookup, plain, position_of
    from eggroll_llm.tasks.dataset.options import DatasetOptions
    from eggroll_llm.tasks.dataset.source import is_path, load_splits
    from eggroll_llm.tasks.task import no_place

    here = Path.cwd()
    options = DatasetOptions(dataset=dataset, subset=subset)
    rows, _ = plain(load_splits(options, here, no_place).train)
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    if is_path(dataset, here):
        dataset = os.path.relpath(here / Path(dataset).expanduser(), recipe.parent.resolve())
    lines = [f"dataset = {format_value(dataset)}"]
    lines += [f"subset = {format_value(subset)}"] if subset else []
    lines.append(f"# columns: {', '.join(map(ascii, names))}")
    countdown = {"nums", "target"} <= set(names)
    try:
        columns = find_columns(rows, options, no_place, graded=not countdown)
    except TaskError:
        if countdown:
            lines += [f"template = {format_value(_ASKING['countdown'])}", 'rewards = "countdown"']
            return _recipe(lines, _MAX_TOKENS["countdown"])
        lines += ['prompt_column = ""          # name one of them', 'answer_column = ""', 'rewards = "exact"']
        return _recipe(lines, 64)
    choices = next((name for name in CHOICES if name in names), "")
    answered = [row for _, row in rows if columns.answer and lookup(row, columns.answer) is not None]
    asked = columns.prompt
    is_text = isinstance(rows[0][1].get(asked), str)

    def by_position(row: Mapping[str, Any]) -> bool:
        listed = row.get(choices)
        if not isinstance(listed, list):
            return False
        position = position_of(lookup(row, columns.answer), listed)
        return position is not None and position < len(listed)

    positions = is_text and bool(answered) and all(map(by_position, answered))
    grader = "choice" if positions else _grader([str(lookup(row, columns.answer)) for row in answered])
    if is_text:
        text = [f"{{{asked}}}", *([f"{{{choices}}}"] if choices and grader == "choice" else []), _ASKING[grader]]
        lines.append(f"template = {format_value(chr(10).join(text))}")
    else:
        lines.append(f"prompt_column = {format_value(asked)}")
    if columns.answer:
        lines.append(f"answer_column = {format_value(columns.answer)}")
    others = ", ".join(f'"{name}"' for name in (*_ASKING, "my_rewards.py:function") if name != grader)
    lines.append(f'rewards = "{grader}"         # or {others}')
    return _recipe(lines, _MAX_TOKENS.get(grader, 32))


def _recipe(options: Sequence[str], max_tokens: int) -> str:
    first = _FIRST_LINES.format(task='"dataset"')
    task = "\n".join([first, "", "[task_options]", *options])
    return _RECIPE.format(task=task, max_tokens=max_tokens, sigma=0.004, learning_rate=0.0005)


def _grader(answers: Sequence[str]) -> str:
    """Return the grader that right answers look like they are for; "countdown" without any."""
    if not answers:
        return "countdown"
    if all("#### " in answer or re.fullmatch(r"-?[0-9][0-9,]*(?:\.[0-9]+)?", answer.strip()) for answer in answers):
        return "gsm8k"
    if all(re.fullmatch(r"\(?[A-Z]\)?\.?", answer.strip()) for answer in answers):
        return "choice"
    return "math" if any("\\" in answer or "$" in answer for answer in answers) else "exact"
