"""Countdown: reach a target from given numbers by arithmetic.

    {"id": "3_7_25=46", "numbers": [7, 25, 3], "target": 46, "solution": "25+7*3"}

Problems are generated, or come from a file of JSONL, JSON or parquet (`file`, with keys `nums` or `numbers` and
`target`) or from a data set on the hub with the same columns (`hub`, such as Jiayi-Pan/Countdown-Tasks-3to4).
Train and test never share a problem, whatever the order of its numbers. The test problems are drawn first, so they
do not depend on `train_size`; where there are too few problems, train gets what is left. The seed is the task's own:
runs with different seeds train on the same problems.

Prompt styles: "chat" asks for `<answer>` tags; "few_shot" is a text to complete, for small and base models,
whose example lines are in neither split; "tinyzero" is the published prompt of TinyZero for base models
(github.com/Jiayi-Pan/TinyZero, Apache-2.0).
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.countdown_generate import Key, Space, draw_problems, key_of
from eggroll_llm.tasks.countdown_read import Solutions, file_problems, hub_problems
from eggroll_llm.tasks.task import Answer, Message, Place, Problem, Split, check_format_reward
from rewards import Score, countdown

_Rows = list[Problem]

_TINYZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer.\nUser: Using the numbers {numbers}, create an equation that equals {target}. You can use basic "
    "arithmetic operations (+, -, *, /) and each number can only be used once. Show your work in <think> "
    "</think> tags. And return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 "
    "</answer>.\nAssistant: Let me solve this step by step.\n<think>"
)
_CHAT = (
    "Write an arithmetic expression that equals {target}. Use the numbers {numbers}, {usage}, with the "
    "operators {operators} and parentheses. Think step by step, then give the expression alone between "
    "<answer> and </answer>, for example <answer>(1 + 2) * 3</answer>."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CountdownOptions:
    """Options of task "countdown"."""

    count: tuple[int, int] = (3, 4)
    """Fewest and most numbers of a problem."""
    number_range: tuple[int, int] = (1, 99)
    """Smallest and largest given number."""
    target_range: tuple[int, int] = (1, 100)
    """Smallest and largest target."""
    operators: str = "+-*/"
    """Operators that problems are made with."""
    file: str = ""
    """File of JSONL, JSON or parquet with problems, relative to the recipe's folder, instead of generated ones."""
    test_file: str = ""
    """Another file with the test problems; without it they are taken from `file`."""
    hub: str = ""
    """Data set on the Hugging Face hub, instead of generated problems."""
    train_size: int = 4096
    """Number of problems to train on, at most."""
    test_size: int = 256
    """Number of held-out problems."""
    seed: int = 0
    """Seed of the problems and of their split, independent of the seed of the run."""
    prompt_style: Literal["chat", "few_shot", "tinyzero"] = "chat"
    """Form of the prompt."""
    shots: int = 3
    """Example lines of the few-shot prompt."""
    use_all: bool = True
    """Whether every number must be used."""
    format_reward: float = 0.1
    """Reward of a wrong answer in the right format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CountdownTask:
    """Countdown with its problems loaded."""

    options: CountdownOptions
    train: Sequence[Problem]
    test: Sequence[Problem]
    shots: Sequence[Problem]
    """Problems with solutions, shown in the few-shot prompt."""
    notes: tuple[str, ...]

    @property
    def stop(self) -> tuple[str, ...]:
        """A few-shot answer ends with its line."""
        return ("\n",) if self.options.prompt_style == "few_shot" else ()

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return all problems of the split."""
        return self.train if split == "train" else self.test

    def prompt(self, problem: Problem) -> str | list[Message]:
        """Return text to complete (few_shot, tinyzero) or one user message (chat)."""
        numbers, target = list(problem["numbers"]), problem["target"]
        if self.options.prompt_style == "tinyzero":
            return _TINYZERO.format(numbers=numbers, target=target)
        if self.options.prompt_style == "few_shot":
            lines = [f"{_question(shot)} {shot['solution']}\n" for shot in self.shots]
            return "".join(lines) + _question(problem)
        usage = "each exactly once" if self.options.use_all else "each at most once"
        operators = " ".join(self.options.operators)
        content = _CHAT.format(target=target, numbers=_listed(numbers), usage=usage, operators=operators)
        return [{"role": "user", "content": content}]

    def score(self, answer: Answer) -> Score:
        """Grade an answer; one that was cut off has no closing tag, so `truncated` changes nothing."""
        return countdown.score(
            answer.text,
            answer.problem["numbers"],
            answer.problem["target"],
            use_all=self.options.use_all,
            format_reward=self.options.format_reward,
            answer_format=self._answer_format,
            thought_open=answer.thought_open or self._opens_thought,
        )

    def answer(self, answer: Answer) -> str | None:
        """Return the expression, without spaces."""
        thought_open = answer.thought_open or self._opens_thought
        expression = countdown.read_answer(answer.text, answer_format=self._answer_format, thought_open=thought_open)
        return "".join(expression.split()) if expression else None

    @property
    def _answer_format(self) -> Literal["tag", "line"]:
        return "line" if self.options.prompt_style == "few_shot" else "tag"

    @property
    def _opens_thought(self) -> bool:
        return self.options.prompt_style == "tinyzero"

    def gold(self, problem: Problem) -> str | None:
        """Return the solution in the format of the prompt style; None for problems that came without one."""
        if "solution" not in problem:
            return None
        if self.options.prompt_style == "few_shot":
            return f" {problem['solution']}"
        answer = f"<answer>{problem['solution']}</answer>"
        return f"</think>\n{answer}" if self._opens_thought else answer

    def kind(self, problem: Problem) -> str:
        """Return the operation that solves two numbers, and how many numbers there are of more."""
        numbers, target = problem["numbers"], problem["target"]
        if len(numbers) != 2:
            return f"{len(numbers)} number{'s' * (len(numbers) > 1)}"
        a, b = numbers
        solved = {
            "sum": target == a + b,
            "difference": target in (a - b, b - a),
            "product": target == a * b,
            "quotient": target * b == a or target * a == b,
        }
        return next((name for name, solves in solved.items() if solves), "other")


def load_countdown(options: CountdownOptions, base_dir: Path, place: Place) -> CountdownTask:
    """Return the task with its problems generated or loaded.

    Raises:
        TaskError: contradictory options, unusable rows, or too few problems.
    """
    _check(options, place)
    space = Space(
        count=options.count,
        number_range=options.number_range,
        target_range=options.target_range,
        operators=options.operators,
    )
    taken: set[Key] = set()
    shots = _draw_shots(options, space, taken) if options.prompt_style == "few_shot" else []
    notes: list[str] = []
    if options.file or options.hub:
        train, test, dropped = _loaded(options, base_dir, taken, notes)
        if dropped:
            notes.append(
                f"Countdown: {dropped} rows were left out because they are repeated, or also in test or in the prompt."
            )
    else:
        train, test = _generated(options, space, taken)
    if len(test) < (1 if options.test_file else options.test_size) or not train:
        raise TaskError(
            f"{place('test_size')}: Countdown: there are only {len(train) + len(test)} different problems, too few "
            f"for test_size = {options.test_size} and at least one to train on. Lower test_size, or give more "
            f"problems; for generated ones, widen count, number_range, target_range or operators."
        )
    if len(train) < options.train_size:
        notes.append(
            f"Countdown trains on all {len(train)} available problems, fewer than train_size = {options.train_size}."
        )
    return CountdownTask(options=options, train=train, test=test, shots=shots, notes=tuple(notes))


def _check(options: CountdownOptions, place: Place) -> None:
    def fail(option: str, problem: str) -> NoReturn:
        raise TaskError(f"{place(option)}: Countdown: {problem}")

    for name, low in (("count", 1), ("number_range", 0), ("target_range", None)):
        first, last = getattr(options, name)
        if first > last or (low is not None and first < low):
            least = "" if low is None else f", the first at least {low}"
            fail(name, f"{name} = [{first}, {last}] is not a range. Write the smallest and the largest value{least}.")
    if options.count[1] > 16:
        fail("count", f"count = {list(options.count)} is too large. At most 16 numbers fit a problem.")
    if (
        not options.operators
        or set(options.operators) - set("+-*/")
        or len(set(options.operators)) < len(options.operators)
    ):
        remedy = 'Write each of + - * / at most once, such as "+-*".'
        fail("operators", f'operators = "{options.operators}" is not valid. {remedy}')
    for name, low in (("train_size", 1), ("test_size", 1), ("shots", 1)):
        if getattr(options, name) < low:
            fail(name, f"{name} = {getattr(options, name)} is too small. Write at least {low}.")
    check_format_reward(options.format_reward, "Countdown", place)
    if options.file and options.hub:
        fail("hub", "file and hub are both given. Remove one of them.")
    if options.test_file and not options.file:
        fail("test_file", "test_file is given without file. Add file with the training problems.")


def _draw_shots(options: CountdownOptions, space: Space, taken: set[Key]) -> list[dict[str, Any]]:
    rng = random.Random(f"countdown shots {options.seed}")
    shots: list[dict[str, Any]] = []
    for i in range(options.shots):
        sign = options.operators[i % len(options.operators)] if options.count[1] > 1 else ""
        shots += draw_problems(space, rng, 1, taken, uses=sign) or draw_problems(space, rng, 1, taken)
    # Numbers in the order in which the solution uses them: small models copy the order.
    return [shot | {"numbers": [int(word) for word in re.findall("[0-9]+", shot["solution"])]} for shot in shots]


def _generated(options: CountdownOptions, space: Space, taken: set[Key]) -> tuple[_Rows, _Rows]:
    rng = random.Random(f"countdown problems {options.seed}")
    test = draw_problems(space, rng, options.test_size, taken)
    train = draw_problems(space, rng, options.train_size, taken)
    # Where there are few problems the likely ones are drawn first, and a validation split is cut off at the end.
    random.Random(f"countdown order {options.seed}").shuffle(train)
    return list(train), list(test)


def _loaded(options: CountdownOptions, base_dir: Path, taken: set[Key], notes: list[str]) -> tuple[_Rows, _Rows, int]:
    """Train, test, and how many rows were left out; what is wrong with solutions is added to the notes."""
    rng = random.Random(f"countdown split {options.seed}")
    test: _Rows = []
    dropped = 0
    rows: Iterable[Problem]
    solutions, test_solutions = (Solutions(use_all=options.use_all) for _ in range(2))
    if options.hub:
        rows = hub_problems(options.hub, rng, solutions)
    else:
        rows = file_problems(base_dir / options.file, solutions)
        if options.test_file:
            given = file_problems(base_dir / options.test_file, test_solutions)
            held_out = [row for row in given if _key(row) not in taken]
            dropped += len(given) - len(held_out)
            taken |= {_key(row) for row in held_out}
            test = held_out[: options.test_size]
        else:
            rng.shuffle(rows)
    train: _Rows = []
    for problem in rows:
        if _key(problem) in taken:
            dropped += 1
            continue
        split = test if len(test) < options.test_size and not options.test_file else train
        if split is train and len(train) == options.train_size:
            break
        taken.add(_key(problem))
        split.append(problem)
    notes += [*solutions.notes(), *test_solutions.notes()]
    return train, test, dropped


def _key(problem: Problem) -> Key:
    return key_of(problem["numbers"], problem["target"])


def _question(problem: Problem) -> str:
    return f"Make {problem['target']} from {_listed(problem['numbers'])}:"


def _listed(numbers: Sequence[int]) -> str:
    words = [str(number) for number in numbers]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
