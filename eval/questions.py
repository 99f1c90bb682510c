"""A task's name and options -> questions, how their answers are graded, and the names of the results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eggroll_llm.config.schema import RewardConfig
from eggroll_llm.errors import ConfigError
from eggroll_llm.records.answers import TASK
from eggroll_llm.tasks.load import load_task
from eggroll_llm.tasks.prompts import Prompt
from eggroll_llm.tasks.task import Problem, Task
from eggroll_llm.training.evaluation import Grader
from eggroll_llm.training.scorer import Scorer
from eval import lm_eval

Protocol = Literal["lm-eval", "task"]


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The test split of a task, ready to be asked."""

    task: str
    """Name in the table."""
    version: str
    """Version of the protocol, of lm-evaluation-harness's tasks; empty for prompts of our own."""
    shots: int | None
    """Worked examples before each question; None where the task's own prompt decides."""
    metric: str
    """What the mean of correct answers is called."""
    problems: Sequence[Problem]
    available: int
    """Problems in the test split."""
    prompts: Sequence[Prompt]
    stop: tuple[str, ...]
    graders: Mapping[str, Grader]
    scorer: Scorer | None = None
    """The task's own grader, which counts its failures; the caller closes it."""
    source: Task
    """The task that the problems are of."""


def lm_eval_questions(
    task: lm_eval.LmEvalTask, options: Mapping[str, Any], base_dir: Path, *, limit: int, shots: int | None, chat: bool
) -> Questions:
    """Return GSM8K as lm-evaluation-harness asks it; `limit` problems from the start, all for 0. Raises UserError."""
    if extra := options.keys() - {"data_dir"}:
        raise ConfigError(
            f"task_options.{sorted(extra)[0]}: lm-eval's protocol does not have this option: leave it out, or add "
            "--protocol task"
        )
    # Chat prompts need no examples, so that all of train is there to draw from.
    data = load_task("gsm8k", {**options, "prompt_style": "chat"}, base_dir=base_dir)
    train, test = data.problems("train"), data.problems("test")
    shots = lm_eval.SHOTS[task] if shots is None else shots
    most = len(train) if task == "gsm8k" else lm_eval.SHOTS[task]
    if not 0 <= shots <= most:
        raise ConfigError(f"--num-fewshot {shots}: {task} has {most} worked examples: give a number from 0 to {most}")
    problems = test[: limit or None]
    return Questions(
        task=task,
        version=lm_eval.VERSION,
        shots=shots,
        metric="exact_match",
        problems=problems,
        available=len(test),
        prompts=list(lm_eval.prompts(task, problems, train, shots, chat=chat)),
        stop=lm_eval.STOP[task],
        graders=lm_eval.graders(task),
        source=data,
    )


def task_questions(
    name: str, options: Mapping[str, Any], base_dir: Path, *, limit: int, limits: RewardConfig
) -> Questions:
    """Return a task's test split with the prompts of training; `limit` problems, all for 0. Raises UserError."""
    task = load_task(name, options, base_dir=base_dir, limits=limits)
    test = task.problems("test")
    problems = test[: limit or None]
    scorer = Scorer(task, limits)
    own: dict[str, Grader] = {TASK: scorer}
    return Questions(
        task=Path(name).name,
        version="",
        shots=None,
        metric="accuracy",
        problems=problems,
        available=len(test),
        prompts=[task.prompt(problem) for problem in problems],
        stop=tuple(task.stop),
        graders=lm_eval.graders("gsm8k") | own if name == "gsm8k" else own,
        scorer=scorer,
        source=task,
    )
