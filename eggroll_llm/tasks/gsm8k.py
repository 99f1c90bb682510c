"""GSM8K: grade school word problems with a number as the answer (Cobbe et al. 2021, arXiv 2110.14168).

    {"id": "test-1", "question": "Janet's ducks lay 16 eggs ...", "answer": "18", "solution": "Janet sells
    ...\\n#### 18"}

Read from `data_dir` (train.jsonl and test.jsonl as published, JSON arrays or parquet), or from openai/gsm8k on the hub.
Every gold answer is checked.

Prompt styles: "chat" asks for a last line `#### number`, "boxed" for it in \\boxed{} as models expect it that were
trained on mathematics in LaTeX; "few_shot" is text to complete. It starts with problems taken from train and their
published solutions, without the `<<9*2=18>>` calculator annotations.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.read import load_file, load_hub, missing_column
from eggroll_llm.tasks.task import Answer, Message, Place, Problem, Split, check_format_reward
from rewards import Score, gsm8k

HUB_NAME = "openai/gsm8k"

_ASKED = {
    "chat": "Think step by step. Then write the final answer on a last line of its own, as #### followed by the number "
    "alone.",
    "boxed": "Please reason step by step, and put your final answer within \\boxed{}.",
}
"""Prompt style -> what a chat message says after the question."""
_ENDINGS = (".jsonl", ".json", ".parquet", "-00000-of-00001.parquet")
"""Of the names of the two files, the first that is there; the last is the hub's."""
_ANNOTATION = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gsm8kOptions:
    """Options of task "gsm8k"."""

    data_dir: str = ""
    """Folder with train.jsonl and test.jsonl (or .json, .parquet), relative to the recipe's folder; empty takes
    openai/gsm8k from the hub."""
    prompt_style: Literal["chat", "boxed", "few_shot"] = "chat"
    """Form of the prompt."""
    shots: int = 4
    """Solved examples of the few-shot prompt."""
    seed: int = 0
    """Seed that chooses the examples, independent of the seed of the run."""
    grader: Literal["robust", "strict", "flexible"] = "robust"
    """How the answer is read: the training reward, or one of the two filters of lm-evaluation-harness."""
    format_reward: float = 0.0
    """Reward of a wrong number that was found where an answer belongs. Above 0 it teaches a model to finish."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gsm8kTask:
    """GSM8K with its problems loaded."""

    options: Gsm8kOptions
    train: Sequence[Problem]
    test: Sequence[Problem]
    shots: Sequence[Problem]
    """Training problems shown in the few-shot prompt, and not trained on."""
    notes: tuple[str, ...]

    @property
    def stop(self) -> tuple[str, ...]:
        """After a few-shot answer the model would invent the next question."""
        return ("\nQuestion:",) if self.options.prompt_style == "few_shot" else ()

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return all problems of the split."""
        return self.train if split == "train" else self.test

    def prompt(self, problem: Problem) -> str | list[Message]:
        """Return text to complete (few_shot) or one user message."""
        if self.options.prompt_style != "few_shot":
            return [{"role": "user", "content": f"{problem['question']}\n\n{_ASKED[self.options.prompt_style]}"}]
        shots = [
            f"Question: {shot['question']}\nAnswer: {_ANNOTATION.sub('', shot['solution'])}\n\n" for shot in self.shots
        ]
        return "".join(shots) + f"Question: {problem['question']}\nAnswer:"

    def score(self, answer: Answer) -> Score:
        """Grade an answer."""
        return gsm8k.score(
            answer.text,
            answer.problem["answer"],
            **answer.options,
            method=self.options.grader,
            format_reward=self.options.format_reward,
        )

    def answer(self, answer: Answer) -> str | None:
        """Return the number in the form that the grader compares."""
        return gsm8k.read_answer(answer.text, **answer.options, method=self.options.grader)

    def gold(self, problem: Problem) -> str | None:
        """Return the published solution."""
        return str(problem["solution"])

    def kind(self, problem: Problem) -> str:
        """Return the number of calculations in the published solution; empty where it has no annotations."""
        steps = len(_ANNOTATION.findall(problem["solution"]))
        return f"{steps} step{'s' * (steps > 1)}" if steps else ""


def load_gsm8k(options: Gsm8kOptions, base_dir: Path, place: Place) -> Gsm8kTask:
    """Return the task with its problems loaded.

    Raises:
        TaskError: missing or unusable data.
    """
    if options.shots < 1:
        raise TaskError(f"{place('shots')}: GSM8K: shots = {options.shots} is too small. Write at least 1.")
    check_format_reward(options.format_reward, "GSM8K", place)
    notes: list[str] = []
    train, test = (_split(split, options, base_dir, notes) for split in ("train", "test"))
    held_out = {problem["question"] for problem in test}
    kept = [problem for problem in train if problem["question"] not in held_out]
    if len(kept) < len(train):
        notes.append(
            f"GSM8K: {len(train) - len(kept)} training problems were left out because they are also test problems."
        )
    shots: list[Problem] = []
    if options.prompt_style == "few_shot":
        if len(kept) <= options.shots:
            raise TaskError(
                f"{place('shots')}: GSM8K: shots = {options.shots} leaves none of {len(kept)} training problems. "
                "Lower shots."
            )
        shots = random.Random(f"gsm8k shots {options.seed}").sample(kept, options.shots)
        kept = [problem for problem in kept if problem not in shots]
    if not kept:
        raise TaskError("GSM8K: no training problem is left. Give train.jsonl problems that are not in test.jsonl.")
    return Gsm8kTask(options=options, train=kept, test=test, shots=shots, notes=tuple(notes))


def _split(split: str, options: Gsm8kOptions, base_dir: Path, notes: list[str]) -> list[Problem]:
    if options.data_dir:
        paths = [base_dir / options.data_dir / f"{split}{ending}" for ending in _ENDINGS]
        path = next((path for path in paths if path.exists()), paths[0])
        return list(_parse(load_file(path), split).values())
    table = load_hub(HUB_NAME, split, "main", instead="set data_dir to a folder with train.jsonl and test.jsonl")
    rows = [(f"{HUB_NAME} {split}[{i}]", row) for i, row in enumerate(table)]
    problems = _parse(rows, split, duplicates_allowed=True)
    if len(problems) < len(rows):
        notes.append(f"GSM8K: {len(rows) - len(problems)} repeated rows were left out of {split}.")
    return list(problems.values())


def _parse(
    rows: Iterable[tuple[str, Mapping[str, Any]]], split: str, *, duplicates_allowed: bool = False
) -> dict[str, Problem]:
    """Question -> problem."""
    problems: dict[str, Problem] = {}
    places: dict[str, str] = {}
    for number, (at, row) in enumerate(rows, start=1):
        question, solution = (_text(row, field, at) for field in ("question", "answer"))
        if question in problems:
            if duplicates_allowed:
                continue
            raise TaskError(f"{at}: the same question is already at {places[question]}. Remove one of them.")
        gold = gsm8k.gold_number(solution) if "#### " in solution else None
        if gold is None:
            raise TaskError(
                f"{at}: answer ends with {solution[-40:]!r}, not with a line #### and a plain number. "
                f"Correct or remove the row."
            )
        problems[question] = {
            "id": f"{split}-{number}",
            "question": question,
            "answer": gold,
            "solution": solution,
        }
        places[question] = at
    return problems


def _text(row: Mapping[str, Any], field: str, at: str) -> str:
    value = row.get(field)
    if value is None:
        raise missing_column(field, row, at, "question and answer")
    if not isinstance(value, str) or not value.strip():
        raise TaskError(f"{at}: {field} = {value!r:.80} is not text. A row needs question and answer, both in quotes.")
    return value
