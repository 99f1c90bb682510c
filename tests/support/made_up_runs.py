"""Run directories as training writes them, made up: which problems are solved at which step is said by digits."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eggroll_llm.config.recipe import to_toml
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.records.answers import TASK, Graded, Sample, write_samples
from eggroll_llm.records.baseline import Constant
from eggroll_llm.records.weights import write_provenance
from eggroll_llm.system.jsonl import to_json

PROBLEMS = tuple({"id": f"p{i}", "numbers": [i, i + 1], "target": 2 * i + 1, "solution": "secret"} for i in range(8))
ENVIRONMENT = {"time": "2026-01-02T03:04:05+00:00", "python": "3.11.7", "packages": {"torch": "2.13.0"}}


def make_config(seed: int = 0, sigma: float = 0.012, **fields: Any) -> RunConfig:
    return RunConfig(
        **{"task": "countdown", "steps": 4, "es": EsSettings(sigma=sigma, learning_rate=1e-3), "seed": seed, **fields}
    )


def write_run(
    path: Path,
    right: Mapping[int, str],
    *,
    config: RunConfig | None = None,
    steps: int | None = None,
    spent: tuple[int, int, float] = (10, 100, 60.0),
    problems: Sequence[Mapping[str, Any]] = PROBLEMS,
    answer: Callable[[int, int, bool], str] = lambda step, i, correct: f"{step}:{i}:{'right' if correct else 'wrong'}",
    finished: bool = True,
    base_model: str = "0123456789abcdef",
    environment: Mapping[str, Any] = ENVIRONMENT,
    kinds: Sequence[str] = (),
    constant: Constant | None = None,
) -> Path:
    """Write a run directory.

    Args:
        right: step -> a digit for each problem, "1" when it is solved.
        spent: completions, generated tokens and seconds of each step.
        answer: completion by step, problem and whether it is right.
        kinds: of each problem.
        constant: the best constant answer, as the run recorded it.
    """
    path.mkdir(parents=True)
    (path / "evaluations").mkdir()
    (path / "config.toml").write_text(to_toml(config or make_config()), encoding="utf-8")
    (path / "journal.jsonl").write_text(json.dumps({"base_model": base_model}) + "\n", encoding="utf-8")
    (path / "environment.json").write_text(json.dumps({"starts": [environment]}), encoding="utf-8")
    last = max(right) if steps is None else steps
    if finished:
        (path / "final").mkdir()
        (path / "final" / "model.safetensors").write_bytes(bytes(2000))
        write_provenance(path / "final", step=last, base_model=base_model)
    rows, completions = [], []
    for step in range(last + 1):
        row: dict[str, Any] = {"step": step, "wall_time": step * spent[2]}
        if step:
            row |= {"reward/mean": step / 10, "completions": spent[0], "tokens/prompt": 7, "tokens/generated": spent[1]}
            row |= {"time/sample": 0.75 * spent[2], "time/update": 0.125 * spent[2], "time/step": spent[2]}
            completions.append({"step": step, "problem": "p0", "completion": f"said at {step}", "correct": True})
        if step in right:
            marks = [mark == "1" for mark in right[step]]
            accuracy = sum(marks) / len(marks)
            row |= {"eval/accuracy": accuracy, "eval/problems": len(marks), "eval/truncated": 0.0, "time/eval": 1.0}
            samples = [
                Sample(
                    problem=i,
                    sample=0,
                    id=problems[i]["id"],
                    doc=problems[i],
                    prompt_hash="0",
                    completion=answer(step, i, mark),
                    tokens=3,
                    truncated=False,
                    scores={TASK: Graded(correct=mark, reward=float(mark), detail="")},
                    kind=kinds[i] if kinds else "",
                )
                for i, mark in enumerate(marks)
            ]
            settings = constant.settings() if constant else {}
            write_samples(path / "evaluations" / f"step-{step:06}.jsonl", settings, samples)
        rows.append(row)
    for name, lines in (("metrics", rows), ("completions", completions)):
        (path / f"{name}.jsonl").write_text("".join(to_json(line) + "\n" for line in lines), encoding="utf-8")
    return path
