"""Task "verifiers": an environment of the package verifiers, as `vf.load_environment` loads it.

    task = "verifiers"

    [task_options]
    environment = "my-environment"    # installed; or a file, "my_environment.py"
    args = { difficulty = "easy" }

Its prompts are the problems and its rubric the reward. The environment itself lives in processes of its own
(`environment`, `tasks.sandbox`): here is what they send of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.task import Answer, Message, Problem, Split
from rewards import Score


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiersTask:
    """An environment of one turn."""

    label: str
    """What messages call it."""
    spec: Mapping[str, Any]
    """What a process loads it from."""
    file_hash: str
    """SHA-256 of its code."""
    hashes: Mapping[str, str]
    """SHA-256 of the rows of each split, as loaded; empty before."""
    train: Sequence[Problem] = ()
    test: Sequence[Problem] = ()
    notes: tuple[str, ...] = ()

    stop: ClassVar[tuple[str, ...]] = ()
    """Where answers end is the recipe's, as all of sampling is."""
    needs_process: ClassVar[bool] = True
    """The environment's code may hang, exit or take all memory."""
    reloads: ClassVar[bool] = False
    """An answer comes with its problem, whose id leads to the row."""
    batched: ClassVar[bool] = True
    """Several answers are scored at once: what waits in a rubric waits side by side."""
    takes_ids: ClassVar[bool] = False
    """No rubric gets the tokens of completions."""

    def hello(self) -> dict[str, Any]:
        """Return what a process that scores loads."""
        return {"verifiers": self.spec}

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return all problems of the split."""
        return self.train if split == "train" else self.test

    def prompt(self, problem: Problem) -> str | list[Message]:
        """Return chat messages, or text to complete, as the environment has them."""
        prompt: str | list[Message] = problem["prompt"]
        return prompt

    def score(self, answer: Answer) -> Score:
        """Raise TaskError: the rubric is in processes of its own, and `training.scorer` asks them."""
        raise TaskError(f"{self.label} is graded in processes of its own alone.")

    def answer(self, answer: Answer) -> str | None:
        """Return None: the parser is in processes of its own, too."""
        return None

    def gold(self, problem: Problem) -> str | None:
        """Return None: an environment has answers, and no completions that earn them."""
        return None

    def kind(self, problem: Problem) -> str:
        """Return nothing: environments do not tell kinds apart."""
        return ""
