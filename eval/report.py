"""Reports as one self-contained HTML file: no network, no script, figures inside, light and dark.

Every text of a run (completions, problems, names, settings) is untrusted: `eval.page`.
"""

import base64
import hashlib
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from eggroll_llm.config.recipe import to_toml
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.errors import RunDirError
from eggroll_llm.models.card import PROMPT
from eggroll_llm.records.accuracy import p_text, percent, points
from eggroll_llm.system.files import describe_failure, write_text
from eggroll_llm.system.jsonl import number, read_rows
from eval import plots
from eval.compare import BUDGETS, Comparison, Example, PairedTest, Seeds, compare_runs, groups_of
from eval.page import inert_text, part, render, section, table
from eval.runs import Budget, Group, Point, Run, about, read_runs
from eval.statistics import LEAST_DISCORDANT
from eval.tables import (
    INTERVAL,
    Grid,
    amount,
    constant_rows,
    figures_grids,
    grids,
    interval_text,
    kinds_grids,
    mean_text,
    pair_text,
    point_text,
    problem_text,
    reward_grids,
)

MOST_TILES = 6  # groups that the head of a page shows; the tables show all
TILE_BUDGET: Budget = "tokens"  # at which they are shown: the one that depends on no machine and on lengths of answers
SETTINGS_LIMIT = 1_000_000
PROMPT_LIMIT = 50_000


def write_run_report(run_path: Path | str) -> Path:
    """Write RUN/report.html and RUN/figures/, replacing those of an earlier report; return the page's path.

    Raises:
        RunDirError: the directory is not a run, has no evaluation yet, is damaged, or cannot be written.
        ConfigError: its configuration cannot be read.
    """
    runs = read_runs([run_path])
    run, comparison = runs[0], compare_runs(runs)
    page = render("Training run", run.name, run_headline(comparison), run_parts(run, comparison, comparison.notes))
    folder = run.directory.path
    return _saved(folder, lambda: _write(folder, page, groups_of(runs)))


def run_parts(run: Run, comparison: Comparison, notes: Sequence[str], signal: Markup | None = None) -> list[Markup]:
    """Return the body of a run's page; `comparison` is of this run alone, `signal` comes below the learning curves."""
    test = comparison.tests[0] if comparison.tests else None
    return [
        part("source", " ".join(about([run]))),
        part("notes", notes),
        section("Learning curves", _overview(groups_of([run]))),
        signal or Markup(),
        section("Evaluations", table(_evaluations_grid(run)), *map(table, kinds_grids(comparison))),
        section("What there is to learn from", *map(table, figures_grids(comparison.runs))),
        section("Rewards", *map(table, reward_grids(run.rows))),
        section("Answers that changed", _examples(test)) if test else Markup(),
        section("Prompt", _prompt(run.directory.example_prompt())),
        section("Time and tokens", *_costs(run)),
        section("Last completions", *_last_completions(run)),
        section("Reproduce", *_reproduce(run)),
        settings(run.config),
        section("Environment", *_environment(run)),
    ]


def write_comparison(runs: Sequence[Run], comparison: Comparison, out_dir: Path | str) -> Path:
    """Write report.html, comparison.json and figures/ into a directory, leaving all else; return the page's path.

    `comparison` is `compare_runs(runs)`. Raises RunDirError when `out_dir` cannot be written.
    """
    groups = groups_of(runs)
    details = (
        part(
            "details",
            f"{pair_text(test)}: {len(test.result.wins)} won, {len(test.result.losses)} lost",
            _examples(test),
        )
        for test in comparison.tests
        if test.won or test.lost
    )
    body = [
        part("source", " ".join(about(runs))),
        part("notes", comparison.notes),
        section("Learning curves", _overview(groups)),
        *(section(grid.title, table(grid)) for grid in grids(comparison)),
        section("Answers that changed", *details),
    ]
    title = "One run" if len(runs) == 1 else f"{len(runs)} runs compared"
    page = render("Comparison", title, _comparison_headline(comparison), body)
    folder = Path(out_dir)

    def write() -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "comparison.json", comparison.json())
        return _write(folder, page, groups)

    return _saved(folder, write)


def settings(config: RunConfig) -> Markup:
    """Return the section with the settings of a run."""
    text = part("pre", inert_text(to_toml(config), SETTINGS_LIMIT))
    return section("Settings", part("details", "All settings, as resolved", text))


def _saved(folder: Path, write: Callable[[], Path]) -> Path:
    try:
        return write()
    except OSError as error:
        raise RunDirError(describe_failure(folder, error, "the report")) from error


def _write(folder: Path, page: str, groups: Sequence[Group]) -> Path:
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    plots.write_png(plots.overview_figure(groups), figures / "overview.png")
    plots.write_png(plots.accuracy_figure(groups), figures / "accuracy.png")
    write_text(folder / "report.html", page)
    return folder / "report.html"


def figure(draw: Callable[[plots.Theme], Figure], name: str, alt: str, caption: str) -> Markup:
    """Return a figure with its caption, drawn in light and in dark; `name` and `alt` describe it to screen readers."""
    return part("figure", *(_data_uri(draw(theme)) for theme in (plots.LIGHT, plots.DARK)), name, alt, caption)


def _overview(groups: Sequence[Group]) -> Markup:
    runs = "; ".join(f"{run.name} {_course(run)}" for group in groups for run in group.runs)
    alt = f"Held-out accuracy and training reward against steps, generated tokens and training time. Accuracy: {runs}."
    caption = plots.caption(groups)
    return figure(lambda theme: plots.overview_figure(groups, theme), "Learning curves", alt, caption)


def _course(run: Run) -> str:
    first, last = run.evaluations[0], run.evaluations[-1]
    return f"{percent(first.accuracy)} at step {first.step}, {percent(last.accuracy)} at step {last.step}"


def _data_uri(figure: Figure) -> Markup:
    return Markup("data:image/svg+xml;base64," + base64.b64encode(plots.svg(figure).encode()).decode())


def run_headline(comparison: Comparison, last: str = "Final") -> Markup:
    """Return what a run has reached; `comparison` is of this run alone, `last` names its last evaluation."""
    run, test = comparison.runs[0], comparison.tests[0] if comparison.tests else None
    spent = f"{run.final.step} steps and {run.final.seconds / 60:.1f} minutes of training"
    if run.final.step == 0:
        sentence = (
            f"The base model's accuracy is {percent(run.final.accuracy)} on {run.final.problems} held-out problems."
        )
    elif run.base is None:
        sentence = f"Accuracy is {percent(run.final.accuracy)} on {run.final.problems} held-out problems after {spent}."
    else:
        problems, base, final = run.final.problems, run.base.accuracy, run.final.accuracy
        difference, tested = final - base, ""
        if test:
            problems, difference, (base, final) = test.result.problems, test.result.difference, test.accuracies
            interval = f"95 % interval {interval_text(test)}, " if test.result.interval else ""
            tested = f" ({interval}{p_text(test.result.p_value)})"
            if not interval:
                tested += f"; fewer than {LEAST_DISCORDANT} problems changed, too few for an interval"
        sentence = (
            f"Accuracy on {problems} held-out problems went from {percent(base)} to {percent(final)} in {spent}: "
            f"{points(difference)} percentage points{tested}."
        )
    tiles = [
        ("Base model", _tile(run.base)),
        (last, _tile(run.final)),
        ("Best, optimistic", _tile(run.best)),
        ("Completions", (amount(run.total.completions), f"{amount(run.total.tokens)} generated tokens")),
    ]
    return part("headline", sentence, tiles)


def _comparison_headline(comparison: Comparison) -> Markup:
    if not comparison.comparable:
        return part("headline", "The accuracies of these runs are not comparable: see the notes.", [])
    groups = comparison.groups
    if len(groups) == 1:
        sentence = f"Final accuracy: {mean_text(groups[0].final)}."
    elif places := _places(comparison):
        sentence = f"Highest accuracy: {'; '.join(places)}."
    else:
        sentence = "No equal budget has two groups, so none is called better."
    if any(math.isfinite(group.final.stderr) for group in groups):
        sentence += " Means over seeds ± standard error over seeds."
    tiles = [_group_tile(group, ranked=len(groups) > 1) for group in groups[:MOST_TILES]]
    return part("headline", sentence, tiles)


def _places(comparison: Comparison) -> list[str]:
    """Return which groups are best at which equal budgets."""
    found: dict[str, list[str]] = {}
    for cut in comparison.cuts:
        values = {group.label: group.within[cut.budget] for group in comparison.groups}
        finite = [mean.value for mean in values.values() if math.isfinite(mean.value)]
        if len(finite) > 1:
            best = {label: mean_text(m) for label, m in values.items() if m.value == max(finite)}
            reached = " and ".join(dict.fromkeys(best.values()))
            found.setdefault(" and ".join(best), []).append(f"{reached} at the {BUDGETS[cut.budget]}")
    return [f"{who}, {', '.join(where)}" for who, where in found.items()]


def _group_tile(group: Seeds, *, ranked: bool) -> tuple[str, tuple[str, str]]:
    final, base = mean_text(group.final), f"base model {percent(group.base.value)}"
    same = group.within.get(TILE_BUDGET) if ranked else None
    if same is None or not math.isfinite(same.value):
        return group.label, (final, base)
    return group.label, (mean_text(same), f"at the {BUDGETS[TILE_BUDGET]}; final {final}; {base}")


def _tile(point: Point | None) -> tuple[str, str]:
    if point is None:
        return "–", "not evaluated"
    return point_text(point), f"at step {point.step}"


def _evaluations_grid(run: Run) -> Grid:
    constants = constant_rows([run.constant] if run.constant else [])

    def cells(point: Point) -> list[str]:
        spent = [f"{point.seconds / 60:.1f}", amount(point.completions), amount(point.tokens)]
        return [f"{point.step}", point_text(point), percent(point.truncated), *spent]

    best = run.best
    return Grid(
        title="Evaluations",
        columns=["step", "accuracy", "cut short", "minutes", "completions", "tokens"],
        rows=[
            *map(cells, run.evaluations),
            *([name, share, "", "", "", ""] for name, _, share in constants),
        ],
        note=f"Greedy answers to {best.problems} held-out problems; accuracy with {INTERVAL}; cut short: ended by the "
        "length limit. Minutes, completions and generated tokens are those of training until then. The highest "
        f"accuracy, of step {best.step}, was selected on these problems, so it is optimistic.",
    )


def _examples(test: PairedTest) -> Markup:
    result = test.result
    won, lost = len(result.wins), len(result.losses)
    text = (
        f"Of {result.problems} problems, {test.second} solves {won} more often than {test.first}, and {lost} less "
        f"often: {p_text(result.p_value)} by an exact sign-flip test. Examples, with one answer of each side:"
    )
    shown = [("won", example) for example in test.won] + [("lost", example) for example in test.lost]
    return Markup("\n").join([part("paragraph", text), *(_example(word, example, test) for word, example in shown)])


def _example(word: str, example: Example, test: PairedTest) -> Markup:
    answers = [(test.first, example.first.strip()), (test.second, example.second.strip())]
    return part("example", word, example.id, problem_text(example.problem), answers)


def _prompt(text: str) -> Markup:
    if not text:
        return Markup()
    return part("paragraph", PROMPT) + "\n" + part("pre", inert_text(text, PROMPT_LIMIT))


def _costs(run: Run) -> list[Markup]:
    """Return where the time of the steps went, and how many tokens there were."""
    steps = [row for row in run.rows if row["step"]]
    total = _sum(steps, "time/step")
    if not total:
        return []
    keys = dict.fromkeys(key for row in steps for key in row if key.startswith("time/"))
    parts = {key[5:]: _sum(steps, key) for key in keys if key not in ("time/step", "time/eval", "time/save")}
    parts["other"] = max(0.0, total - sum(parts.values()))
    shares = [seconds / total for seconds in parts.values()]
    time = Grid(
        title="Time",
        columns=["part of a step", "seconds", "share"],
        rows=[[name, f"{seconds / len(steps):.3f}", percent(seconds / total)] for name, seconds in parts.items()],
        note=f"Mean over {len(steps)} steps of {total / len(steps):.1f} s. In addition, over the whole run: "
        f"{_sum(steps, 'time/save'):.1f} s of saving (up to the last step) and "
        f"{_sum(run.rows, 'time/eval'):.1f} s of evaluations.",
    )
    prompt, generated = _sum(steps, "tokens/prompt"), _sum(steps, "tokens/generated")
    sampling, completions = parts.get("sample", 0.0), _sum(steps, "completions")
    speeds = [f"{tokens / sampling:,.0f}" if sampling else "–" for tokens in (prompt, generated, prompt + generated)]
    tokens = Grid(
        title="Tokens",
        columns=["tokens", "total", "per completion", "per second of sampling"],
        rows=[
            [name, amount(count), f"{count / completions:.1f}" if completions else "–", speed]
            for name, count, speed in zip(
                ("prompt", "generated", "both"), (prompt, generated, prompt + generated), speeds, strict=True
            )
        ],
        note=f"Over {amount(completions)} completions in training.",
    )
    return [table(time, shares), table(tokens)]


def _sum(rows: Iterable[Mapping[str, Any]], key: str) -> float:
    return math.fsum(value for row in rows if math.isfinite(value := number(row, key)))


def _last_completions(run: Run) -> list[Markup]:
    rows = read_rows(run.directory.completions) if run.directory.completions.is_file() else []
    last = [row for row in rows if row.get("step") == rows[-1].get("step")]
    return [_last_completion(row) for row in last]


def _last_completion(row: Mapping[str, Any]) -> Markup:
    question = row.get("question") or f"problem {row.get('problem')}"
    text = str(row.get("completion", "")).strip()
    return part("completion", bool(row.get("correct")), row.get("step"), question, text)


def _reproduce(run: Run) -> list[Markup]:
    name = shlex.quote(run.directory.path.resolve().name)
    commands = [f"eggroll-llm train {name}/config.toml --run-dir NEW_RUN"]
    parts = []
    if run.directory.journal.is_file() and run.config.method == "es":
        commands.append(f"eggroll-llm replay {name} --out NEW_MODEL")
        journal = run.directory.journal.read_bytes()
        sentence = (
            "The base model and journal.jsonl rebuild the weights of every step. The journal has "
            f"{_size(len(journal))}{_beside(run.directory.final)};"
        )
        parts.append(part("journal", sentence, hashlib.sha256(journal).hexdigest()))
    return [part("pre", "\n".join(commands)), *parts]


def _beside(final: Path) -> str:
    files = [path for path in final.rglob("*") if path.is_file()] if final.is_dir() else []
    return f" (the model in final/ {_size(sum(path.stat().st_size for path in files))})" if files else ""


def _size(count: int) -> str:
    return f"{amount(count)}{'B' if count >= 1000 else ' B'}"


def _environment(run: Run) -> list[Markup]:
    if not run.starts:
        return []
    last = dict(run.starts[-1])
    packages = last.pop("packages", {})
    rows = [*last.items(), *(packages.items() if isinstance(packages, Mapping) else ())]
    note = "When the run started" if len(run.starts) == 1 else f"At the last of {len(run.starts)} starts"
    grid = Grid(
        title="Environment", columns=["", "value"], rows=[[key, f"{value}"] for key, value in rows], note=note, texts=2
    )
    return [part("details", "Machine and versions", table(grid))]
