"""The speed of sampling a population next to plain vLLM and to the other ways of doing it, in strict alternation.

Every variant is a process that starts once and then waits. Variants are measured in groups, to bound the memory, and in
rounds: plain vLLM, eager and compiled, then each variant of the group, so that a machine whose speed drifts treats all
alike, and every ratio is taken within a round. All get the same prompts and generate the same numbers of tokens (no
stopping, no prefix cache). What each variant does is in `engine.bench_variants`.
"""

import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from eggroll_llm.config.schema import RunConfig
from eggroll_llm.engine.memory import kept_bytes, member_bytes
from eggroll_llm.errors import UserError
from eggroll_llm.models.targets import trained_parameters
from eggroll_llm.system.files import write_output_file
from eggroll_llm.system.invocation import child_python
from eggroll_llm.training.prepare import Prepared, prepare

PIPE_WIDTH = 180  # columns of the table where there is no terminal
GIB = 2**30
WAVES = {"even": 1, "mixed": 4}  # sequences of a workload / sequences decoded at once
MIXED_LENGTHS = 64  # different ones, if there are as many sequences


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is asked of each variant."""

    sequences: int
    """Decoded at once: all of the workload "even", a quarter of "mixed"."""
    new_tokens: int
    """Of each sequence in "even"; in "mixed" the most, and a quarter of it the least."""

    def lengths(self, workload: str) -> list[int]:
        """Return the new tokens of every sequence."""
        count, least = WAVES[workload] * self.sequences, max(1, self.new_tokens // 4)
        if workload == "even":
            return [self.new_tokens] * count
        kinds = min(count, MIXED_LENGTHS)
        lengths = [least + i % kinds * (self.new_tokens - least) // (kinds - 1) for i in range(count)]
        random.Random(0).shuffle(lengths)
        return lengths


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of serving the same requests."""

    name: str
    """As in the table."""
    kind: Literal["plain", "population", "stock", "files", "swap"]
    """What runs: see `engine.bench_variants`."""
    rank: int = 0
    """Rank of the perturbations; 0 is none, or full."""
    slots: int = 0
    """Resident members."""
    population: int = 0
    """Members, dealt out to the sequences in turn."""
    compiled: bool = False
    """Through torch.compile on CPU, CUDA graphs elsewhere."""


EAGER = Variant(name="plain, eager", kind="plain")
COMPILED = Variant(name="plain, compiled", kind="plain", compiled=True)


def population(rank: int, members: int = 64, *, slots: int = 0, compiled: bool = False, note: str = "") -> Variant:
    """Our engine with a name that says what differs."""
    slots = slots or members
    parts = [f"population of {members}, rank {rank}"]
    parts += [f"{slots} slots"] * (slots != members) + ["compiled"] * compiled + [note] * bool(note)
    name = ", ".join(parts)
    return Variant(name=name, kind="population", rank=rank, slots=slots, population=members, compiled=compiled)


STOCK = Variant(name="vLLM's LoRA, fed in memory", kind="stock", rank=1, slots=64, population=64)
FILES = Variant(name="vLLM's LoRA, files in a RAM disk", kind="files", rank=1, slots=64, population=64)
SWAP = Variant(name="all weights swapped, one member at a time", kind="swap", population=64)

GROUPS: tuple[tuple[str, tuple[Variant, ...]], ...] = (  # workload and variants
    ("even", (population(1), population(8), population(1, compiled=True))),
    ("even", (population(2), population(4), population(16))),
    ("even", (population(1, 16), population(1, 128))),
    ("even", (STOCK, FILES, SWAP)),
    ("mixed", (population(1, note="mixed lengths"), population(1, 256, slots=64, note="mixed lengths"))),
)


class Worker:
    """A variant's process."""

    def __init__(self, variant: Variant, job: dict[str, Any]) -> None:
        command = [*child_python(), "-W", "ignore", "-m", "eggroll_llm.bench.worker"]
        self.variant = variant
        self._messages = tempfile.TemporaryFile("w+")  # noqa: SIM115 - vLLM's remarks, shown if it fails
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages, text=True
        )
        self.ask(job | asdict(variant))

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message and return the answer. Raises UserError when the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and its output ends too
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                answer: dict[str, Any] = json.loads(line.removeprefix("answer "))
                return answer
        status = self._process.wait()
        self._messages.seek(0)
        last = "".join(self._messages.readlines()[-10:])
        self.close()
        raise UserError(f"benchmark: {self.variant.name!r} ended with status {status}:\n{last}")

    def close(self) -> None:
        """End the process, which takes the end of its input for a goodbye and cleans up."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
        for stream in (self._process.stdout, self._messages):
            if stream is not None:
                stream.close()


Round = dict[str, dict[str, Any]]
"""The answers of one round by variant name."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The rounds of one group."""

    workload: str
    variants: Sequence[Variant]
    """The references, then those of the group."""
    rounds: Sequence[Round]


def bench(config: RunConfig, recipe_dir: Path, size: Size, repeats: int, out: Path | None, wanted: str = "") -> None:
    """Measure the variants with `wanted` in their name, print a table, write JSON to `out`. Raises UserError."""
    groups = [(work, tuple(v for v in variants if wanted in v.name)) for work, variants in GROUPS]
    groups = [(work, variants) for work, variants in groups if variants]
    if not groups:
        names = "\n  ".join(variant.name for _, variants in GROUPS for variant in variants)
        raise UserError(f"--variants {wanted!r} is in none of these names:\n  {names}")
    for workload, variants in groups:
        _check_shares(size, workload, variants)
    prepared = prepare(config, recipe_dir)
    job = _job(prepared, size, alive=2 + max(len(variants) for _, variants in groups))
    console, measured = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH), []
    references: list[Worker] = []
    try:
        references = _start((EAGER, COMPILED), job, console)
        if not references or references[0].variant != EAGER:
            raise UserError(f"benchmark: {EAGER.name!r} does not run, and all others are compared with it")
        for workload, variants in groups:
            measured.append(_measure(references, variants, job, workload, repeats, console))
    finally:
        for worker in references:
            worker.close()
    table = [row for group in _merge_references(measured) for row in rows(group, prepared, size)]
    show(table, repeats, size, console)
    if out:
        write_output_file(out, json.dumps(table, indent=1) + "\n")


def _check_shares(size: Size, workload: str, variants: Sequence[Variant]) -> None:
    """Every member has to answer as many prompts, or a population would be smaller than it is called."""
    count = WAVES[workload] * size.sequences
    for variant in variants:
        if variant.population and count % variant.population:
            multiple = variant.population // math.gcd(variant.population, WAVES[workload])
            raise UserError(
                f"--sequences {size.sequences}: {count} prompts do not divide among the members of {variant.name!r}: "
                f"use a multiple of {multiple}, or leave it out with --variants"
            )


def _workload(name: str, prepared: Prepared, size: Size) -> dict[str, Any]:
    prompts, lengths = [list(prompt) for prompt in prepared.train.prompts], size.lengths(name)
    return {"prompts": [prompts[i % len(prompts)] for i in range(len(lengths))], "new_tokens": lengths}


def _job(prepared: Prepared, size: Size, alive: int) -> dict[str, Any]:
    longest = max(map(len, prepared.train.prompts)) + size.new_tokens
    engine = prepared.config.engine
    # Processes share a GPU; on a CPU the setting has no effect.
    share = engine.gpu_memory_utilization / alive
    engine = replace(engine, max_sequences=size.sequences, gpu_memory_utilization=share)
    return {
        "model_dir": str(prepared.model_dir),
        "engine": asdict(engine),
        "sigma": prepared.config.es.sigma,
        "context": -(-longest // 32) * 32,
        "workloads": {name: _workload(name, prepared, size) for name in WAVES},
    }


def _start(variants: Sequence[Variant], job: dict[str, Any], console: Console) -> list[Worker]:
    """Start what can be started here; say what cannot."""
    workers = []
    for variant in variants:
        with console.status(f"starting {variant.name}"):
            try:
                workers.append(Worker(variant, job))
            except UserError as error:
                console.print(f"{error}; left out", style="yellow")
    return workers


def _measure(
    references: Sequence[Worker],
    variants: Sequence[Variant],
    job: dict[str, Any],
    workload: str,
    repeats: int,
    console: Console,
) -> Measured:
    workers = [*references, *_start(variants, job, console)]
    rounds: list[Round] = []
    try:
        for repeat in range(repeats + 1):
            answers: Round = {}
            for worker in list(workers):
                name = worker.variant.name
                try:
                    with console.status(f"round {repeat} of {repeats}: {name}"):
                        answers[name] = worker.ask({"workload": workload, "repeat": repeat})
                except UserError as error:
                    if worker in references:
                        raise
                    console.print(f"{error}; left out", style="yellow")
                    workers.remove(worker)
            if repeat:  # the first round warms caches up
                rounds.append(answers)
    finally:
        for worker in workers[len(references) :]:
            worker.close()
    return Measured(workload=workload, variants=[worker.variant for worker in workers], rounds=rounds)


def _merge_references(measured: Sequence[Measured]) -> list[Measured]:
    """Put the rounds of all groups of a workload into one, so that the references have one row for all of them."""
    merged = []
    for workload in dict.fromkeys(group.workload for group in measured):
        groups = [group for group in measured if group.workload == workload]
        variants = list(dict.fromkeys(variant for group in groups for variant in group.variants))
        rounds = [answers for group in groups for answers in group.rounds]
        merged.append(Measured(workload=workload, variants=variants, rounds=rounds))
    return merged


def rows(measured: Measured, prepared: Prepared, size: Size) -> list[dict[str, Any]]:
    """Return one JSON object per variant: medians over the rounds it took part in; ratios are taken within a round."""
    work = _workload(measured.workload, prepared, size)
    variants = [v for v in measured.variants if any(v.name in answers for answers in measured.rounds)]
    speed = {
        variant.name: statistics.median(
            answers[variant.name]["tokens_per_second"] for answers in measured.rounds if variant.name in answers
        )
        for variant in variants
    }
    best = max((name for name in (EAGER.name, COMPILED.name) if name in speed), key=speed.__getitem__)
    table = []
    for variant in variants:
        rounds = [answers for answers in measured.rounds if variant.name in answers]
        own = [answers[variant.name] for answers in rounds]
        plain = [answers[EAGER.name] for answers in rounds]
        ratios = {
            reference: [
                answers[variant.name]["tokens_per_second"] / answers[to]["tokens_per_second"] for answers in rounds
            ]
            for reference, to in (("eager", EAGER.name), ("best", best))
        }
        table.append(
            {
                **asdict(variant),
                **asdict(size),
                "workload": measured.workload,
                "prompt_tokens": sum(map(len, work["prompts"])),
                "generated_tokens": sum(work["new_tokens"]),
                "tokens_per_second": speed[variant.name],
                "tokens_per_second_range": _range([answer["tokens_per_second"] for answer in own]),
                "generated_per_second": statistics.median(answer["generated_per_second"] for answer in own),
                "ratio_to_plain_eager": statistics.median(ratios["eager"]),
                "ratio_to_plain_eager_range": _range(ratios["eager"]),
                "ratio_to_plain_best": statistics.median(ratios["best"]),
                "ratio_to_plain_best_range": _range(ratios["best"]),
                **{
                    key: _median_or_none([a[key] for a in own])
                    for key in ("noise_seconds", "update_seconds", "serve_seconds")
                },
                "resident_gib": own[-1]["resident_gib"],
                "resident_over_plain_gib": own[-1]["resident_gib"] - plain[-1]["resident_gib"],
                "resident_over_plain_gib_predicted": predicted_gib(variant, prepared),
            }
        )
    return table


def predicted_gib(variant: Variant, prepared: Prepared) -> float | None:
    """Return the memory that a population takes beside plain vLLM; None for what is not ours.

    Slots and one copy of the noise at S * r * (in + out) values of a weight, and float32 masters.
    """
    if variant.kind != "population":
        return None
    shapes = trained_parameters(prepared.model_dir)
    masters = 4 * sum(out * inside for _, out, inside in shapes)
    size = 4 if prepared.config.engine.dtype == "float32" else 2
    member = member_bytes(shapes, variant.rank, size)
    return (masters + variant.slots * member + kept_bytes(member, variant.population // 2)) / GIB


def _range(values: Sequence[float]) -> list[float]:
    return [min(values), max(values)]


def _median_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def show(table: Sequence[dict[str, Any]], repeats: int, size: Size, console: Console) -> None:
    """Print a table for each workload."""
    for workload in dict.fromkeys(row["workload"] for row in table):
        part = [row for row in table if row["workload"] == workload]
        prompt, new = part[0]["prompt_tokens"], part[0]["generated_tokens"]
        lengths = size.lengths(workload)
        least, most = min(lengths), max(lengths)
        view = Table(
            title=f"{len(lengths)} sequences, {most if least == most else f'{least} to {most}'} new tokens each: "
            f"{prompt:,} prompt and {new:,} new tokens, {size.sequences} at a time",
            caption=f"Medians of {repeats} rounds or more (least-most). tokens/s: prompt and new tokens. Ratios: to "
            "plain vLLM in the same round, eager and the faster of eager and compiled. Noise, update, repack: seconds "
            "of a step. Memory: GiB resident, then what it is more than plain eager, measured / predicted.",
        )
        for column in (
            "variant",
            "tokens/s",
            "new/s",
            "of eager",
            "of best",
            "noise",
            "update",
            "repack",
            "memory",
            "more",
        ):
            view.add_column(column, justify="left" if column == "variant" else "right")
        for row in part:
            predicted = row["resident_over_plain_gib_predicted"]
            more = f"{row['resident_over_plain_gib']:.2f}" + (f" / {predicted:.2f}" if predicted is not None else "")
            view.add_row(
                row["name"],
                f"{row['tokens_per_second']:,.0f}",
                f"{row['generated_per_second']:,.0f}",
                *(
                    "{:.3f} ({:.3f}-{:.3f})".format(row[f"ratio_to_plain_{to}"], *row[f"ratio_to_plain_{to}_range"])
                    for to in ("eager", "best")
                ),
                *(_seconds(row[f"{part_of_step}_seconds"]) for part_of_step in ("noise", "update", "serve")),
                f"{row['resident_gib']:.2f}",
                more if row["kind"] != "plain" else "",
            )
        console.print(view)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
