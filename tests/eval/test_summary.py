"""Figures of graded samples by hand, and the table in lm-eval's form."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from eggroll_llm.errors import ConfigError
from eggroll_llm.records.accuracy import wilson
from eggroll_llm.records.answers import TASK, Graded, Sample
from eggroll_llm.records.baseline import Constant
from eggroll_llm.training.scorer import FAILED
from eval.evaluation import Results, Settings
from eval.questions import Questions
from eval.subject import Subject
from eval.summary import summarize, table, write_summary

FACTS = {
    "model": "0123",
    "version": "3",
    "num_fewshot": 5,
    "apply_chat_template": False,
    "problems": 2,
    "prompts": "ab" * 32,
    "max_tokens": 256,
    "temperature": 0.7,
    "top_p": 1.0,
    "samples": 4,
    "seed": 3,
    "dtype": "bfloat16",
}


def results(answers: list[list[str | None]], grader: str = "robust", available: int = 9, **facts: Any) -> Results:
    """Problems whose right answer is "r"; rewards are 1, and 0.25 for "f"."""
    samples = [
        Sample(
            problem=p,
            sample=s,
            id=p,
            doc={},
            prompt_hash="",
            completion="",
            tokens=10,
            truncated=answer is None,
            scores={
                grader: Graded(
                    correct=answer == "r", reward={"r": 1.0, "f": 0.25}.get(answer or "", 0), detail="", answer=answer
                )
            },
        )
        for p, row in enumerate(answers)
        for s, answer in enumerate(row)
    ]
    questions = Questions(
        task="gsm8k",
        version="3",
        shots=5,
        metric="exact_match",
        problems=[{}] * len(answers),
        available=available,
        prompts=[""] * len(answers),
        stop=(),
        graders={grader: lambda *_: None},  # type: ignore[arg-type, return-value]
        source=None,  # type: ignore[arg-type]
    )
    settings = Settings(
        subject=Subject(name="it", model_dir=Path("/m"), config=None), task="gsm8k", protocol="lm-eval", task_options={}
    )
    return Results(settings=settings, questions=questions, samples=samples, facts=FACTS | facts, constant=None)


def test_one_greedy_answer_each() -> None:
    summary = summarize(results([["r"], ["w"], ["r"], [None], ["r"]]), [])
    assert summary["results"] == {
        "gsm8k": {"exact_match,robust": 0.6, "exact_match_stderr,robust": pytest.approx(math.sqrt(0.6 * 0.4 / 4))}
    }
    assert summary["n-samples"] == {"gsm8k": {"original": 9, "effective": 5}}
    assert (summary["limited"], summary["truncated"], summary["completions"]) == (True, 0.2, 5)
    assert summary["tokens/generated"] == 50
    assert summarize(results([["r"]] * 9), [])["limited"] is False


def test_several_answers_each() -> None:
    """pass@1 is the mean over problems of their means: 3/4, 1/4, 0. pass@2: 1 - C(1,2)/6, 1 - C(3,2)/6, 0.

    Votes: r of r r w r; w of w w r -; nobody votes in the third. The first two answers of the second are w w.
    """
    found = summarize(results([["r", "r", "w", "r"], ["w", "w", "r", None], [None] * 4]), [2, 4])["results"]["gsm8k"]
    assert found["exact_match,robust"] == pytest.approx(1 / 3)
    assert found["exact_match_stderr,robust"] == pytest.approx(math.sqrt((25 + 1 + 16) / 144 / 2 / 3))
    assert found["pass@2,robust"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["pass@4,robust"] == pytest.approx((1 + 1 + 0) / 3)
    assert found["maj@2,robust"] == found["maj@4,robust"] == pytest.approx(1 / 3)
    assert found["maj@4_stderr,robust"] == pytest.approx(1 / 3)


def test_a_task_of_ones_own_shows_its_reward_too() -> None:
    found = summarize(results([["r"], ["f"]], grader=TASK), [])["results"]["gsm8k"]
    assert (found["exact_match,task"], found["reward,task"]) == (0.5, 0.625)


def test_a_task_that_does_not_say_its_answers_has_no_votes() -> None:
    found = summarize(results([["r", "f"], ["r", "r"]], grader=TASK), [2])["results"]["gsm8k"]
    assert "maj@2,task" in found
    silent = results([["r", "f"], ["r", "r"]], grader=TASK)
    samples = [
        dataclasses.replace(s, scores={TASK: dataclasses.replace(s.scores[TASK], answer=None)}) for s in silent.samples
    ]
    found = summarize(dataclasses.replace(silent, samples=samples), [2])["results"]["gsm8k"]
    assert {key for key in found if "stderr" not in key} == {"exact_match,task", "reward,task", "pass@2,task"}


def test_what_limits_the_figures_is_said() -> None:
    """One reward of four is NaN, one score failed; the step was selected on these problems."""
    plain = results([["r"], ["f"], ["w"], ["w"]], grader=TASK, available=4)
    grades = [
        {"reward": 1.0},
        {"reward": math.nan},
        {"reward": 0.0, "detail": FAILED},
        {"reward": 0.5},
    ]
    samples = [
        dataclasses.replace(s, scores={TASK: dataclasses.replace(s.scores[TASK], **grade)})
        for s, grade in zip(plain.samples, grades, strict=True)
    ]
    subject = dataclasses.replace(plain.settings.subject, selected_on=3)
    settings = dataclasses.replace(plain.settings, subject=subject)
    summary = summarize(dataclasses.replace(plain, samples=samples, settings=settings), [])
    assert summary["results"]["gsm8k"]["reward,task"] == 0.5
    assert (summary["rewards/failed"], summary["rewards/not_finite"], summary["selected_on"]) == (1, 1, 3)
    assert table(summary).splitlines()[-3:] == [
        "score() failed on 1 completions, which count as wrong",
        "1 rewards were not finite and are left out of the mean reward",
        "optimistic: this step was chosen as the best of its run on the first 2 of these problems",
    ]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    shown = table(summarize(results([["r", "w", "r", None], ["w", "w", "r", "w"]]), [4]))
    assert shown.splitlines() == [
        "|Tasks                    |Version|Filter|n-shot|Metric     | | Value| |Stderr|95 % interval   |",
        "|-------------------------|------:|------|-----:|-----------|-|-----:|-|-----:|----------------|",
        "|gsm8k (LIMITED to 2 of 9)|      3|robust|     5|exact_match|↑|0.3750|±|0.1250|[0.0561, 0.8583]|",
        "|                         |      3|robust|     5|pass@4     |↑|1.0000|±|0.0000|[0.3424, 1.0000]|",
        "|                         |      3|robust|     5|maj@4      |↑|0.5000|±|0.5000|[0.0945, 0.9055]|",
        "",
        "it (bfloat16, weights 0123): 2 problems, 4 completions each, temperature 0.7, top-p 1, seed 3, at most 256 "
        "tokens, 12.5% cut off; prompts abababababababab",
    ]
    greedy = table(summarize(results([["r"], ["w"]], available=2, temperature=0.0, samples=1), []))
    assert "LIMITED" not in greedy
    embedded = table(summarize(results([["r"], ["w"]]), []) | {"model_name": "smollm2-135m-instruct"})
    assert "\nSmolLM2-135M-Instruct, 4-bit GGUF expanded to bfloat16 (bfloat16, weights 0123): " in embedded
    assert "2 problems, 1 completion each, greedy, at most 256" in greedy


def test_kinds_and_the_best_constant_answer_are_shown_where_there_are_some() -> None:
    """Three problems: two of the second kind, one of which is solved in one of two answers."""
    plain = results([["r", "r"], ["r", "w"], ["w", "w"]], available=3)
    samples = [dataclasses.replace(s, kind="10 steps" if s.problem else "2 | steps") for s in plain.samples]
    constant = Constant(pattern="7|", accuracy=1 / 3, problems=3)
    summary = summarize(dataclasses.replace(plain, samples=samples, constant=constant), [])
    assert summary["kinds"]["robust"]["10 steps"] == {
        "accuracy": 0.25, "interval": pytest.approx(wilson(0.25, 2)), "problems": 2
    }  # fmt: skip
    lines = table(summary).splitlines()
    assert "|best constant answer: 7¦| |0.3333| |      |[0.0615, 0.7923]|" in lines[3]
    assert lines[5:9] == [
        "|Filter|Kind of problem|Problems| Value|95 % interval   |",
        "|------|---------------|-------:|-----:|----------------|",
        "|robust|2 ¦ steps      |       1|1.0000|[0.2065, 1.0000]|",
        "|robust|10 steps       |       2|0.2500|[0.0267, 0.8021]|",
    ]
    one_kind = [dataclasses.replace(s, kind="one") for s in plain.samples]
    assert "Kind" not in table(summarize(dataclasses.replace(plain, samples=one_kind), []))


def test_nothing_solved_is_not_known_exactly() -> None:
    """lm-eval's standard error is 0 then; a mean reward has no such interval."""
    summary = summarize(results([["w"]] * 8, grader=TASK), [])
    assert summary["results"]["gsm8k"]["exact_match_stderr,task"] == 0
    assert summary["intervals"]["gsm8k"] == {"exact_match,task": (0.0, pytest.approx(0.3244, abs=1e-4))}
    accuracy, reward = table(summary).splitlines()[2:4]
    assert "|0.0000|±|0.0000|[0.0000, 0.3244]|" in accuracy
    assert reward.endswith("|0.0000|±|0.0000|                |")


def test_what_is_written_is_strict_json(tmp_path: Path) -> None:
    def no_constant(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    path = tmp_path / "result.json"
    write_summary(path, summarize(results([["r"]]), []))
    found = json.loads(path.read_text(encoding="ascii"), parse_constant=no_constant)
    assert found["results"]["gsm8k"] == {"exact_match,robust": 1.0, "exact_match_stderr,robust": None}
    said = r"--out .*/no/result\.json: cannot write \d+ bytes \(No such file or directory; free space unknown\)\. "
    with pytest.raises(ConfigError, match=said):
        write_summary(tmp_path / "no" / "result.json", summarize(results([["r"]]), []))
