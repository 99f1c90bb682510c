"""Task "dataset": questions and answers from a file, a folder or the hub, graded by name or by functions. No Python.

    task = "dataset"

    [task_options]
    dataset = "sums.jsonl"                        # {"question": "What is 2 + 3?", "answer": "5"}
    template = "{question} Answer with a number." # or prompt_column = "question"
    rewards = ["exact", "style.py:short"]
    reward_weights = [1.0, 0.2]

All that can be said of the data is said at the start: which columns are what, rows that cannot be used, right answers
that their own grader does not accept, and problems that occur twice.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from eggroll_llm.tasks.dataset.columns import lookup
from eggroll_llm.tasks.dataset.graders import GRADERS
from eggroll_llm.tasks.dataset.rewards import Rewards
from eggroll_llm.tasks.modules import source_hash, unpacked
from eggroll_llm.tasks.task import Answer, Message, Problem, Split
from rewards import Score


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetTask:
    """A data set with its rewards."""

    label: str
    """What messages call it."""
    spec: Mapping[str, Any]
    """What `rewards` were loaded from."""
    rewards: Rewards
    train: Sequence[Problem]
    test: Sequence[Problem]
    stop: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    hashes: ClassVar[Mapping[str, str]] = {}
    reloads: ClassVar[bool] = False
    """A process that scores gets each problem with its answer."""

    @property
    def needs_process(self) -> bool:
        """Return whether a reward may hang, exit or take all memory."""
        graders = [GRADERS[name] for name in self.spec["names"] if name in GRADERS]
        return bool(self.rewards.functions) or any(grader.needs_process for grader in graders)

    @property
    def batched(self) -> bool:
        """Return whether rewards get several completions at once."""
        return bool(self.rewards.functions)

    @property
    def takes_ids(self) -> bool:
        """Return whether a reward gets the tokens of completions."""
        return self.rewards.takes_ids

    @property
    def file_hash(self) -> str:
        """Return the SHA-256 of the functions' files and of what these import from beside them; empty without any."""
        if not self.spec["files"]:
            return ""
        hashes = [source_hash(*unpacked(sent)) for sent in self.spec["files"].values()]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def hello(self) -> dict[str, Any]:
        """Return what a process that scores loads."""
        return {"dataset": self.spec}

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return all problems of the split."""
        return self.train if split == "train" else self.test

    def prompt(self, problem: Problem) -> str | list[Message]:
        """Return text to complete, or chat messages."""
        return self.rewards.columns.sent(problem)

    def score(self, answer: Answer) -> Score:
        """Return the weighted sum of the rewards."""
        return self.rewards.score(answer)

    def answer(self, answer: Answer) -> str | None:
        """Return the answer that the first grader by name reads."""
        return self.rewards.answer(answer)

    def kind(self, problem: Problem) -> str:
        """Return the kind of a problem, where a column says it."""
        kind = lookup(problem, self.rewards.columns.kind)
        return str(kind) if isinstance(kind, str | int) else ""

    def gold(self, problem: Problem) -> str | None:
        """Return the right answer as the first grader expects it; None where a function comes first."""
        grader = GRADERS.get(self.spec["names"][0])
        return grader.gold(self.rewards.columns.gold(problem)) if grader and grader.gold else None
