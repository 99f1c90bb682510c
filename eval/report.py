"""Reports as one HTML file that needs nothing else: no network, no script, figures inside, light and dark.

Every text of a run (completions, problems, names, settings) is somebody else's: `_text` makes it inert, control and
direction characters visible, before it comes near the markup. A content security policy forbids the rest.
"""

import base64
import hashlib
import html
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from eggroll_llm.config.recipe import to_toml
from eggroll_llm.errors import RunDirError
from eggroll_llm.records.accuracy import p_text, percent, points
from eggroll_llm.system.files import describe_failure, write_text
from eggroll_llm.system.jsonl import number, read_rows
from eggroll_llm.system.terminal import inert_lines
from eval import plots
from eval.compare import BUDGETS, Comparison, Example, PairedTest, Seeds, Summary, compare_runs, groups_of
from eval.runs import Budget, Group, Point, Run, about, read_runs
from eval.statistics import LEAST_DISCORDANT
from eval.tables import INTERVAL, Grid, amount, grids, interval_text, mean_text, pair_text, point_text, problem_text

_HERE = Path(__file__).parent
MOST_TILES = 6  # groups that the head of a page shows; the tables show all
TILE_BUDGET: Budget = "tokens"  # at which they are shown: the one that depends on no machine and on lengths of answers
TEXT_LIMIT = 4000  # characters of one text; a completion can be a megabyte
SETTINGS_LIMIT = 1_000_000
PROMPT_LIMIT = 50_000


def write_run_report(run_path: Path | str) -> Path:
    """Write RUN/report.html and RUN/figures/, replacing those of an earlier report; return the page's path.

    Raises:
        RunDirError: the directory is no run, has no evaluation yet, is damaged, or cannot be written.
        ConfigError: its configuration cannot be read.
    """
    runs = read_runs([run_path])
    run, comparison, groups = runs[0], compare_runs(runs), groups_of(runs)
    test = comparison.tests[0] if comparison.tests else None
    body = [
        f'<p class="source">{_text(" ".join(about(runs)))}</p>',
        _notes(comparison),
        _section("Learning curves", _overview(groups)),
        _section("Evaluations", _table(_evaluations_grid(run))),
        _section("Answers that changed", _examples(test)) if test else "",
        _section("Prompt", _prompt(run.directory.example_prompt())),
        _section("Time and tokens", *_costs(run)),
        _section("Last completions", *_last_completions(run)),
        _section("Reproduce", *_reproduce(run)),
        _section(
            "Settings",
            _details("All settings, as resolved", f"<pre>{_text(to_toml(run.config), SETTINGS_LIMIT)}</pre>"),
        ),
        _section("Environment", *_environment(run)),
    ]
    page = _page("Training run", run.name, _run_headline(comparison.runs[0], test), body)
    folder = run.directory.path
    return _saved(folder, lambda: _write(folder, page, groups))


def write_comparison(runs: Sequence[Run], comparison: Comparison, out_dir: Path | str) -> Path:
    """Write report.html, comparison.json and figures/ into a directory, leaving all else; return the page's path.

    `comparison` is `compare_runs(runs)`. Raises RunDirError when `out_dir` cannot be written.
    """
    groups = groups_of(runs)
    details = (
        _details(f"{pair_text(test)}: {len(test.result.wins)} won, {len(test.result.losses)} lost", _examples(test))
        for test in comparison.tests
        if test.won or test.lost
    )
    body = [
        f'<p class="source">{_text(" ".join(about(runs)))}</p>',
        _notes(comparison),
        _section("Learning curves", _overview(groups)),
        *(_section(grid.title, _table(grid)) for grid in grids(comparison)),
        _section("Answers that changed", *details),
    ]
    title = "One run" if len(runs) == 1 else f"{len(runs)} runs compared"
    page = _page("Comparison", title, _comparison_headline(comparison), body)
    folder = Path(out_dir)

    def write() -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "comparison.json", comparison.json())
        return _write(folder, page, groups)

    return _saved(folder, write)


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


def _text(value: object, limit: int = TEXT_LIMIT) -> str:
    """Return text for HTML in which nothing acts on a browser or on the order of letters; its lines are kept."""
    return html.escape(inert_lines(str(value), limit))


def _page(kind: str, title: str, headline: str, body: Iterable[str]) -> str:
    template = Template((_HERE / "report.html").read_text(encoding="utf-8"))
    style = (_HERE / "report.css").read_text(encoding="utf-8")
    parts = "\n".join(part for part in body if part)
    return template.substitute(kind=_text(kind), title=_text(title), style=style, headline=headline, body=parts)


def _section(title: str, *parts: str) -> str:
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{_text(title)}</h2>\n{content}\n</section>" if content else ""


def _details(summary: str, content: str) -> str:
    return f"<details>\n<summary>{_text(summary)}</summary>\n{content}\n</details>"


def _scroll(label: str, content: str) -> str:
    """What is wider than the screen scrolls on its own; the keyboard must reach it."""
    return f'<div class="scroll" role="region" aria-label="{_text(label)}" tabindex="0">\n{content}\n</div>'


def _table(grid: Grid, shares: Sequence[float] = ()) -> str:
    """A table; `shares` (0 to 1) are drawn as bars beside its rows."""
    kinds = ["" if i < grid.texts else ' class="n"' for i in range(len(grid.columns))]
    head = "".join(f'<th scope="col"{kind}>{_text(name)}</th>' for kind, name in zip(kinds, grid.columns, strict=True))
    rows = []
    for i, row in enumerate(grid.rows):
        first, *others = (_text(cell) for cell in row)
        cells = "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds[1:], others, strict=True))
        bar = f'<td class="bar"><span style="width:{100 * shares[i]:.1f}%"></span></td>' if shares else ""
        rows.append(f'<tr><th scope="row">{first}</th>{cells}{bar}</tr>')
    head += "<td></td>" if shares else ""
    caption = f"<caption><span>{_text(grid.note or grid.title)}</span></caption>"
    table = f"<table>{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table>"
    return _scroll(grid.title, table)


def _overview(groups: Sequence[Group]) -> str:
    light, dark = (_data_uri(plots.overview_figure(groups, theme)) for theme in (plots.LIGHT, plots.DARK))
    runs = "; ".join(f"{run.name} {_course(run)}" for group in groups for run in group.runs)
    alt = f"Held-out accuracy and training reward against steps, generated tokens and training time. Accuracy: {runs}."
    picture = (
        f'<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{_text(alt)}"></picture>'
    )
    caption = _text(plots.caption(groups, reward=True))
    return f"<figure>\n{_scroll('Learning curves', picture)}\n<figcaption>{caption}</figcaption>\n</figure>"


def _course(run: Run) -> str:
    first, last = run.evaluations[0], run.evaluations[-1]
    return f"{percent(first.accuracy)} at step {first.step}, {percent(last.accuracy)} at step {last.step}"


def _data_uri(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(plots.svg(figure).encode()).decode()


def _notes(comparison: Comparison) -> str:
    items = "".join(f"<li>{_text(note)}</li>" for note in comparison.notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _run_headline(run: Summary, test: PairedTest | None) -> str:
    spent = f"{run.final.step} steps and {run.final.seconds / 60:.1f} minutes of training"
    if run.final.step == 0:
        sentence = (
            f"Accuracy of the base model is {percent(run.final.accuracy)} on {run.final.problems} held-out problems."
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
        ("Final", _tile(run.final)),
        ("Best, optimistic", _tile(run.best)),
        ("Completions", (amount(run.total.completions), f"{amount(run.total.tokens)} generated tokens")),
    ]
    return f'<p class="lead">{_text(sentence)}</p>\n{_tiles(tiles)}'


def _comparison_headline(comparison: Comparison) -> str:
    if not comparison.comparable:
        return '<p class="lead">The accuracies of these runs are not comparable: see the notes.</p>'
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
    return f'<p class="lead">{_text(sentence)}</p>\n{_tiles(tiles)}'


def _places(comparison: Comparison) -> list[str]:
    """Which groups are best at which equal budgets."""
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


def _tiles(tiles: Sequence[tuple[str, tuple[str, str]]]) -> str:
    items = (
        f"<div><dt>{_text(label)}</dt><dd>{_text(value)}<small>{_text(remark)}</small></dd></div>"
        for label, (value, remark) in tiles
    )
    return f'<dl class="tiles">{"".join(items)}</dl>'


def _tile(point: Point | None) -> tuple[str, str]:
    if point is None:
        return "–", "not evaluated"
    return point_text(point), f"at step {point.step}"


def _evaluations_grid(run: Run) -> Grid:
    def cells(point: Point) -> list[str]:
        spent = [f"{point.seconds / 60:.1f}", amount(point.completions), amount(point.tokens)]
        return [f"{point.step}", point_text(point), percent(point.truncated), *spent]

    best = run.best
    return Grid(
        title="Evaluations",
        columns=["step", "accuracy", "cut short", "minutes", "completions", "tokens"],
        rows=[cells(point) for point in run.evaluations],
        note=f"Greedy answers to {best.problems} held-out problems; accuracy with {INTERVAL}; cut short: ended by the "
        "length limit. Minutes, completions and generated tokens are those of training until then. The highest "
        f"accuracy, of step {best.step}, was selected on these very problems, so it is optimistic.",
    )


def _examples(test: PairedTest) -> str:
    result = test.result
    won, lost = len(result.wins), len(result.losses)
    text = (
        f"Of {result.problems} problems, {test.second} solves {won} more often than {test.first}, and {lost} less "
        f"often: {p_text(result.p_value)}, of an exact sign-flip test. Some of them, with one answer of each side:"
    )
    shown = [("won", example) for example in test.won] + [("lost", example) for example in test.lost]
    return f"<p>{_text(text)}</p>\n" + "\n".join(_example(word, example, test) for word, example in shown)


def _example(word: str, example: Example, test: PairedTest) -> str:
    answers = "".join(
        f"<div><p>{_text(name)}</p><pre>{_text(answer.strip())}</pre></div>"
        for name, answer in ((test.first, example.first), (test.second, example.second))
    )
    return (
        f'<article class="example"><p><span class="{word}">{word}</span> · problem {_text(example.id)}</p>'
        f'<pre>{_text(problem_text(example.problem))}</pre><div class="answers">{answers}</div></article>'
    )


def _prompt(text: str) -> str:
    if not text:
        return ""
    words = "The first held-out problem as the model sees it, with the chat template where the task uses one:"
    return f"<p>{words}</p>\n<pre>{_text(text, PROMPT_LIMIT)}</pre>"


def _costs(run: Run) -> list[str]:
    """Where the time of the steps went, and how many tokens there were."""
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
        note=f"Mean over {len(steps)} steps of {total / len(steps):.1f} s. Apart from that, in all: "
        f"{_sum(steps, 'time/save'):.1f} s of saving (what followed the last step not counted), "
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
    return [_table(time, shares), _table(tokens)]


def _sum(rows: Iterable[Mapping[str, Any]], key: str) -> float:
    return math.fsum(value for row in rows if math.isfinite(value := number(row, key)))


def _last_completions(run: Run) -> list[str]:
    rows = read_rows(run.directory.completions) if run.directory.completions.is_file() else []
    last = [row for row in rows if row.get("step") == rows[-1].get("step")]
    return [_last_completion(row) for row in last]


def _last_completion(row: Mapping[str, Any]) -> str:
    right = bool(row.get("correct"))
    question = row.get("question") or f"problem {row.get('problem')}"
    return (
        f'<article class="example"><p><span class="{"won" if right else "lost"}">{"right" if right else "wrong"}</span>'
        f" · step {_text(row.get('step'))}, {_text(question)}</p>"
        f"<pre>{_text(str(row.get('completion', '')).strip())}</pre></article>"
    )


def _reproduce(run: Run) -> list[str]:
    name = shlex.quote(run.directory.path.resolve().name)
    commands = [f"eggroll-llm train {name}/config.toml --run-dir NEW_RUN"]
    parts = []
    if run.directory.journal.is_file() and run.config.method == "es":
        commands.append(f"eggroll-llm replay {name} --out NEW_MODEL")
        journal = run.directory.journal.read_bytes()
        parts.append(
            f"<p>The base model and journal.jsonl give back the weights of every step. The journal has "
            f"{_size(len(journal))}{_beside(run.directory.final)}; its SHA-256 is "
            f"<code>{hashlib.sha256(journal).hexdigest()}</code>.</p>"
        )
    return [f"<pre>{_text(chr(10).join(commands))}</pre>", *parts]


def _beside(final: Path) -> str:
    files = [path for path in final.rglob("*") if path.is_file()] if final.is_dir() else []
    return f" (the model in final/ {_size(sum(path.stat().st_size for path in files))})" if files else ""


def _size(count: int) -> str:
    return f"{amount(count)}{'B' if count >= 1000 else ' B'}"


def _environment(run: Run) -> list[str]:
    if not run.starts:
        return []
    last = dict(run.starts[-1])
    packages = last.pop("packages", {})
    rows = [*last.items(), *(packages.items() if isinstance(packages, Mapping) else ())]
    note = "When the run was started" if len(run.starts) == 1 else f"At the last of {len(run.starts)} starts"
    grid = Grid(
        title="Environment", columns=["", "value"], rows=[[key, f"{value}"] for key, value in rows], note=note, texts=2
    )
    return [_details("Machine and versions", _table(grid))]
