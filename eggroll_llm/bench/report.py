"""Rounds of the benchmark -> a JSON object for each variant, and the table on the terminal."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from eggroll_llm.bench.plan import EAGER, Size, Variant
from eggroll_llm.bench.subject import Subject, population_bytes
from eggroll_llm.system.hardware import GIB

Round = dict[str, dict[str, Any]]
"""The answers of one round by variant name."""
REFERENCES = ("plain", "shipped")
"""Kinds that the others are compared with."""
_PHASES = (
    "generated_per_second",
    "prefill_seconds",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "decode_step_seconds",
    "scored_tokens_per_second",
)
_PARTS_OF_STEP = ("noise_seconds", "update_seconds", "serve_seconds", "rest_of_step")


@dataclass(kw_only=True)
class Measured:
    """The rounds of one wave."""

    workload: str
    variants: Sequence[Variant]
    rounds: list[Round] = field(default_factory=list)
    about: dict[Variant, dict[str, Any]] = field(default_factory=dict)
    """How each variant runs, and how long it took to start."""


def rows(measured: Sequence[Measured], subject: Subject, size: Size) -> list[dict[str, Any]]:
    """Return one JSON object per workload and variant: medians over the rounds it took part in."""
    return [
        row
        for workload in dict.fromkeys(wave.workload for wave in measured)
        for row in _rows([wave for wave in measured if wave.workload == workload], subject, size)
    ]


def _rows(waves: Sequence[Measured], subject: Subject, size: Size) -> list[dict[str, Any]]:
    rounds = [answers for wave in waves for answers in wave.rounds]
    about = {variant: how for wave in waves for variant, how in wave.about.items()}
    answered = {name for answers in rounds for name in answers}
    variants = [v for v in dict.fromkeys(v for wave in waves for v in wave.variants) if v.name in answered]
    speeds = {
        v.name: [answers[v.name]["tokens_per_second"] for answers in rounds if v.name in answers] for v in variants
    }
    speed = {name: statistics.median(values) for name, values in speeds.items()}
    lengths = size.lengths(waves[0].workload)
    prompts = [len(subject.prompts[i % len(subject.prompts)]) for i in range(len(lengths))]
    plain_memory = [answers[EAGER.name]["memory_gib"] for answers in rounds if EAGER.name in answers]
    table = []
    for variant in variants:
        own = [answers[variant.name] for answers in rounds if variant.name in answers]
        ratios = {
            to.name: [
                # In the same round, as a machine's speed drifts; where not both were alive at once, to the median.
                answers[variant.name]["tokens_per_second"]
                / answers.get(to.name, {"tokens_per_second": speed[to.name]})["tokens_per_second"]
                for answers in rounds
                if variant.name in answers
            ]
            for to in variants
            if to.kind in REFERENCES
        }
        scored = [
            answer["scored_tokens_per_second"] / plain
            for answers in rounds
            if (answer := answers.get(variant.name, {})).get("scored_tokens_per_second")
            and (plain := answers.get(EAGER.name, {}).get("prefill_tokens_per_second"))
        ]
        memory = own[-1]["memory_gib"]
        predicted = population_bytes(subject, variant) / GIB if variant.kind == "population" else None
        table.append(
            {
                **asdict(variant),
                **asdict(size),
                **about.get(variant, {}),
                "workload": waves[0].workload,
                "rounds": len(own),
                "prompt_tokens": sum(prompts),
                "generated_tokens": sum(lengths),
                "tokens_per_second": speed[variant.name],
                "tokens_per_second_range": _range(speeds[variant.name]),
                **{key: _median_or_none([answer.get(key) for answer in own]) for key in (*_PHASES, *_PARTS_OF_STEP)},
                "scored_to_prefill": [statistics.median(scored), *_range(scored)] if scored else None,
                "ratio_to": {name: [statistics.median(values), *_range(values)] for name, values in ratios.items()},
                "memory_gib": memory,
                "memory_over_plain_gib": memory - plain_memory[-1] if plain_memory else None,
                "memory_over_plain_gib_predicted": predicted,
            }
        )
    return table


def _range(values: Sequence[float]) -> list[float]:
    return [min(values), max(values)]


def _median_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def show(table: Sequence[dict[str, Any]], size: Size, console: Console) -> None:
    """Print a table for each workload."""
    for workload in dict.fromkeys(row["workload"] for row in table):
        part = [row for row in table if row["workload"] == workload]
        lengths = size.lengths(workload)
        least, most = min(lengths), max(lengths)
        how = f"temperature {size.temperature:g}" if size.temperature else "greedy"
        references = [row["name"] for row in part if row["kind"] in REFERENCES]
        view = Table(
            title=f"{len(lengths)} prompts, {most if least == most else f'{least} to {most}'} new tokens each: "
            f"{part[0]['prompt_tokens']:,} prompt and {part[0]['generated_tokens']:,} new tokens, "
            f"{size.num_prompts} at a time, {how}, on {part[0].get('device', 'cpu')}",
            caption=f"Medians of {min(row['rounds'] for row in part)} rounds or more (least-most). tokens/s: prompt "
            "and new tokens. prefill: seconds to the first token of all prompts. step: milliseconds of a forward pass "
            "that decodes a token of each. scored/s: tokens of completions and prompts that members score, and as a "
            "fraction of plain eager's prompt tokens/s in prefill. of ...: tokens/s, as a fraction in the same round. "
            "noise + update + serve: milliseconds of a training step, and their share of it; a GPU makes the noise "
            "while members answer, so it is in tokens/s, too. GiB: in use (GPU: peak), "
            "then what it is more than plain eager, measured / predicted. start: seconds. vLLM: how it runs.",
        )
        for column in ("variant", "tokens/s", "new/s", "prefill", "decode/s", "step", "scored/s"):
            view.add_column(column, justify="left" if column == "variant" else "right")
        for name in references:
            view.add_column(f"of {name}", justify="right")
        for column in ("noise + update + serve", "GiB", "more", "start", "vLLM"):
            view.add_column(column, justify="right")
        for row in part:
            view.add_row(*_cells(row, references))
        console.print(view)


def _cells(row: dict[str, Any], references: Sequence[str]) -> list[str]:
    step, over = row["decode_step_seconds"], row["memory_over_plain_gib"]
    more = "" if over is None or row["kind"] in REFERENCES else f"{over:.2f}"
    if more and row["memory_over_plain_gib_predicted"] is not None:
        more += f" / {row['memory_over_plain_gib_predicted']:.2f}"
    return [
        row["name"],
        f"{row['tokens_per_second']:,.0f}",
        f"{row['generated_per_second']:,.0f}",
        _number(row["prefill_seconds"], ".2f"),
        _number(row["decode_tokens_per_second"], ",.0f"),
        "" if step is None else f"{1e3 * step:.2f}",
        _scored(row),
        *("{:.2f} ({:.2f}-{:.2f})".format(*row["ratio_to"][name]) for name in references),
        _rest_of_step(row),
        f"{row['memory_gib']:.2f}",
        more,
        _number(row.get("start_seconds"), ".0f"),
        _how_it_runs(row),
    ]


def _scored(row: dict[str, Any]) -> str:
    text = _number(row["scored_tokens_per_second"], ",.0f")
    return f"{text} ({row['scored_to_prefill'][0]:.2f})" if row["scored_to_prefill"] else text


def _how_it_runs(row: dict[str, Any]) -> str:
    """Return what sets an engine apart from one in this process, one step after the other, without graphs."""
    parts = {"mp": row.get("multiprocess"), "async": row.get("async_scheduling"), "v2": row.get("second_model_runner")}
    graphs = row.get("cudagraph_mode", "NONE").rpartition(".")[2].lower()
    return " ".join([*(name for name, on in parts.items() if on), *([graphs] if graphs != "none" else [])])


def _rest_of_step(row: dict[str, Any]) -> str:
    parts = [row[f"{name}_seconds"] for name in ("noise", "update", "serve")]
    text = " + ".join("–" if part is None else f"{1e3 * part:.0f}" for part in parts)
    if row["rest_of_step"] is not None:
        text += f", {100 * row['rest_of_step']:.1f} %"
    return "" if all(part is None for part in parts) else text


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
