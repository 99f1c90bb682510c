"""Graded samples -> the figures: accuracy, pass@k and maj@k with their errors, as JSON and as lm-eval's table.

Keys are those of lm-evaluation-harness, "metric,filter". A metric is a mean over problems of a value per problem:

    exact_match, accuracy           mean over the problem's completions (pass@1)
    reward                          mean over those of the problem's completions whose reward is finite
    pass@k                          unbiased estimate from all completions of the problem
    maj@k                           whether the most frequent answer of the first k completions is right

Completions without an answer do not vote; a problem without any vote counts as wrong.

The standard error is lm-eval's, which is 0 where all problems come out alike, so we add a column with the interval of
`eggroll_llm.records.accuracy.wilson`. A mean reward, which need not lie between 0 and 1, has none.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from eggroll_llm.engine.sampling import ADDED
from eggroll_llm.models.called import called
from eggroll_llm.records.accuracy import mean, wilson
from eggroll_llm.records.answers import TASK, Sample
from eggroll_llm.records.baseline import Share, by_kind
from eggroll_llm.system.files import write_output_file
from eggroll_llm.system.jsonl import to_json
from eggroll_llm.system.terminal import inert
from eggroll_llm.training.evaluation import finite_rewards
from eggroll_llm.training.scorer import FAILED
from eval.evaluation import Results
from eval.statistics import majority, pass_at_k, stderr

HEADER = ("Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr", "95 % interval")

KINDS_HEADER = ("Filter", "Kind of problem", "Problems", "Value", "95 % interval")

REWARD = "reward"


def summarize(results: Results, ks: Sequence[int]) -> dict[str, Any]:
    """Return the figures, with `ks` the k of pass@k and maj@k beside 1, as JSON values."""
    questions, samples = results.questions, results.samples
    by_problem: dict[int, list[Sample]] = {}
    for sample in samples:
        by_problem.setdefault(sample.problem, []).append(sample)
    figures: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for grader in questions.graders:
        # A task of one's own need not say what its answers are.
        votes = grader != TASK or any(sample.scores[TASK].answer is not None for sample in samples)
        for name, value in _metrics(grader, questions.metric, ks, votes=votes).items():
            values = [v for group in by_problem.values() if math.isfinite(v := value(group))]
            figures[f"{name},{grader}"] = mean(values)
            figures[f"{name}_stderr,{grader}"] = stderr(values)
            if name != REWARD:
                intervals[f"{name},{grader}"] = wilson(figures[f"{name},{grader}"], len(values))
    return {
        "model_name": results.settings.subject.name,
        "results": {questions.task: figures},
        "intervals": {questions.task: intervals},
        "n-samples": {questions.task: {"original": questions.available, "effective": len(by_problem)}},
        "limited": len(by_problem) < questions.available,
        "completions": len(samples),
        "truncated": mean([sample.truncated for sample in samples]),
        "tokens/generated": sum(sample.tokens for sample in samples),
        "rewards/failed": sum(graded.detail == FAILED for s in samples for graded in s.scores.values()),
        "rewards/not_finite": sum(not math.isfinite(graded.reward) for s in samples for graded in s.scores.values()),
        "best_constant": asdict(results.constant) if results.constant else None,
        "kinds": {
            grader: {kind: _share_figures(share) for kind, share in shares.items()}
            for grader in questions.graders
            if (shares := by_kind(samples, grader))
        },
        "selected_on": results.settings.subject.selected_on,
        "config": dict(results.facts),
    }


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the figures as JSON. Raises ConfigError when the file cannot be written."""
    standard = json.loads(to_json(summary))  # JSON has no NaN and no half surrogates
    write_output_file(path, json.dumps(standard, indent=1) + "\n")


def table(summary: Mapping[str, Any]) -> str:
    """Return the figures as lm-eval's Markdown table with one more column, and the conditions they hold for."""
    config = summary["config"]
    ((task, figures),) = summary["results"].items()
    count = summary["n-samples"][task]
    name = f"{task} (LIMITED to {count['effective']} of {count['original']})" if summary["limited"] else task
    rows = []
    for key, value in figures.items():
        metric, _, grader = key.partition(",")
        if not metric.endswith("_stderr"):
            shots = "" if config["num_fewshot"] is None else str(config["num_fewshot"])
            error = figures[f"{metric}_stderr,{grader}"]
            version = config["version"]
            ends = summary["intervals"][task].get(key)
            interval = f"[{ends[0]:.4f}, {ends[1]:.4f}]" if ends else ""
            rows.append((name, version, grader, shots, metric, "↑", f"{value:.4f}", "±", f"{error:.4f}", interval))
            name = ""
    if constant := summary["best_constant"]:
        low, high = wilson(constant["accuracy"], constant["problems"])
        figures = (f"{constant['accuracy']:.4f}", "", "", f"[{low:.4f}, {high:.4f}]")
        rows.append(("", "", "", "", f"best constant answer: {_cell(constant['pattern'])}", "", *figures))
    parts = [_markdown(HEADER, rows), *_kinds_tables(summary), _conditions(summary)]
    return "\n\n".join(parts)


def _share_figures(share: Share) -> dict[str, Any]:
    interval = wilson(share.accuracy, share.problems)
    return {"accuracy": share.accuracy, "interval": interval, "problems": share.problems}


def _cell(text: str) -> str:
    return inert(text, 40).replace("|", "¦")


def _kinds_tables(summary: Mapping[str, Any]) -> list[str]:
    """Return the accuracies by kind of problem, as one table; none without kinds."""
    rows = []
    for grader, shares in summary["kinds"].items():
        for kind, found in shares.items():
            low, high = found["interval"]
            rows.append(
                (grader, _cell(kind), f"{found['problems']}", f"{found['accuracy']:.4f}", f"[{low:.4f}, {high:.4f}]")
            )
    return [_markdown(KINDS_HEADER, rows)] if rows else []


Metric = Callable[[Sequence[Sample]], float]
"""Value of one problem's completions."""


def _metrics(grader: str, metric: str, ks: Sequence[int], *, votes: bool) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {metric: partial(_correct, grader)}
    if grader == TASK:
        metrics[REWARD] = lambda group: mean(finite_rewards(group, grader))
    for k in ks:
        metrics[f"pass@{k}"] = partial(_pass, grader, k)
        if votes:
            metrics[f"maj@{k}"] = partial(_majority, grader, k)
    return metrics


def _correct(grader: str, group: Sequence[Sample]) -> float:
    return mean([sample.scores[grader].correct for sample in group])


def _pass(grader: str, k: int, group: Sequence[Sample]) -> float:
    return pass_at_k(sum(sample.scores[grader].correct for sample in group), len(group), k)


def _majority(grader: str, k: int, group: Sequence[Sample]) -> float:
    winner = majority([sample.scores[grader].answer for sample in group[:k]])
    return 0.0 if winner is None else float(group[winner].scores[grader].correct)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    right = {i for i, name in enumerate(header) if name in ("Version", "n-shot", "Value", "Stderr", "Problems")}

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"|{'|'.join(padded)}|"

    rule = [f"{'-' * (w - 1)}:" if i in right else "-" * w for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def _conditions(summary: Mapping[str, Any]) -> str:
    config = summary["config"]
    how = (
        f"temperature {config['temperature']:g}, top-p {config['top_p']:g}, seed {config['seed']}"
        if config["temperature"]
        else "greedy"
    )
    how += "".join(f", {key.replace('_', '-')} {config[key]:g}" for key in ADDED if key in config)
    answers = "completion" if config["samples"] == 1 else "completions"
    chat = ", chat template" if config["apply_chat_template"] else ""
    return (
        f"{called(summary['model_name'])} ({config['dtype']}, weights {config['model']}): "
        f"{config['problems']} problems, {config['samples']} {answers} each, {how}, at most "
        f"{config['max_tokens']} tokens, {summary['truncated']:.1%} cut off{chat}; prompts {config['prompts'][:16]}"
        + "".join(f"\n{remark}" for remark in _remarks(summary))
    )


def _remarks(summary: Mapping[str, Any]) -> list[str]:
    found = []
    if failed := summary["rewards/failed"]:
        found.append(f"score() failed on {failed} completions, which count as wrong")
    if not_finite := summary["rewards/not_finite"]:
        found.append(f"{not_finite} rewards were not finite and are left out of the mean reward")
    if selected_on := summary["selected_on"]:
        found.append(
            "optimistic: this step was chosen as the best of its run on the first "
            f"{min(selected_on, summary['config']['problems'])} of these problems"
        )
    return found
