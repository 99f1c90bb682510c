"""GSM8K as lm-evaluation-harness asks and grades it: tasks `gsm8k` and `gsm8k_cot`, version 3.0, of lm-eval 0.4.13.

Prompts, stop strings, length limit, filters and normalisation are those of the package, and tests compare them with the
package itself. `gsm8k` opens with worked problems drawn from train, anew for each test problem by one generator seeded
with 1234, so that the prompt of a problem depends on how many came before it; `gsm8k_cot` opens with the same eight
worked examples for all. With the chat template, each worked example is a turn of its own.

As its vLLM backend does, special tokens stay in the text, the end-of-text token is one more stop string, and the
tokenizer adds its special tokens unless a prompt starts with one.

We differ in two ways: a prompt that does not fit the model's context is rejected, where lm-eval cuts off its beginning,
and the grade `robust` is ours.
"""

import json
import random
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from eggroll_llm.engine.interface import Completion
from eggroll_llm.records.answers import Graded
from eggroll_llm.tasks.prompts import Prompt
from eggroll_llm.tasks.task import Problem
from eggroll_llm.training.evaluation import Grader
from rewards import gsm8k

LmEvalTask = Literal["gsm8k", "gsm8k_cot"]
TASKS: tuple[LmEvalTask, ...] = ("gsm8k", "gsm8k_cot")
VERSION = "3"
SHOTS = {"gsm8k": 5, "gsm8k_cot": 8}
SEED = 1234
MAX_TOKENS = 256
STOP = {"gsm8k": ("Question:", "</s>", "<|im_end|>"), "gsm8k_cot": ("Q:", "</s>", "<|im_end|>")}
_QUESTION = {"gsm8k": "Question: {}\nAnswer:", "gsm8k_cot": "Q: {}\nA:"}


def prompts(
    task: LmEvalTask, test: Sequence[Problem], train: Sequence[Problem], shots: int, *, chat: bool
) -> Iterator[Prompt]:
    """Yield the prompt of each test problem, in order: a text, or messages for the chat template.

    `test` must start with the first problem of the test split; `shots` is at most 8 for gsm8k_cot.
    """
    question = _QUESTION[task].format
    draw = random.Random(SEED)
    for problem in test:
        turns = [
            (question(q), a) for q, a in (_cot_shots()[:shots] if task == "gsm8k_cot" else _drawn(draw, train, shots))
        ]
        if chat:
            yield [
                {"role": role, "content": content}
                for q, a in turns
                for role, content in (("user", q), ("assistant", a))
            ] + [{"role": "user", "content": question(problem["question"])}]
        else:
            yield "".join(f"{q} {a}\n\n" for q, a in turns) + question(problem["question"])


def graders(task: LmEvalTask) -> dict[str, Grader]:
    """Return lm-eval's two filters and our reward, by name."""
    return {
        "strict-match": partial(_grade, method="strict_cot" if task == "gsm8k_cot" else "strict"),
        "flexible-extract": partial(_grade, method="flexible"),
        "robust": partial(_grade, method="robust"),
    }


def _grade(completion: Completion, problem: Problem, method: gsm8k.Method) -> Graded:
    # The whole published solution, as lm-eval's normalisation applies to the gold answer too.
    how: dict[str, Any] = {"truncated": completion.truncated, "thought_open": completion.thought_open, "method": method}
    score = gsm8k.score(completion.text, problem["solution"], **how)
    answer = gsm8k.read_answer(completion.text, **how)
    return Graded(correct=score.correct, reward=score.reward, detail=score.detail, answer=answer)


def _drawn(draw: random.Random, train: Sequence[Problem], shots: int) -> list[tuple[str, str]]:
    return [(shot["question"], shot["solution"]) for shot in draw.sample(train, shots)]


@cache
def _cot_shots() -> list[tuple[str, str]]:
    rows = json.loads(Path(__file__).with_name("gsm8k_cot.json").read_text(encoding="utf-8"))["shots"]
    return [(row["question"], row["target"]) for row in rows]
