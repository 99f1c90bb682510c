"""Learning curves: held-out accuracy and training reward against steps, generated tokens and training time.

Several seeds of one experiment are drawn as their mean with a band from the lowest to the highest, over the range of
the x axis that all of them cover, each interpolated linearly between its points, and each seed as a thin line with a
dot at each evaluation.
A single run has a whisker, the 95 % interval over problems, at each evaluation.

Everything goes through figure objects: no display, no global state. The same runs give the same bytes.
"""

import contextlib
import io
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from eggroll_llm.records.accuracy import wilson
from eggroll_llm.system.jsonl import number
from eval.runs import Group, Point, Run, constants_of

Axis = Literal["step", "tokens", "seconds"]
AXES: tuple[Axis, ...] = ("step", "tokens", "seconds")
Array = NDArray[np.float64]

DPI = 200
ANSWERS = "answers in training"
RAW_POINTS = 300  # of a run's rewards that are drawn: more cannot be told apart
WHISKERS = 4  # lone runs in a panel that whiskers can still be told apart for

# Okabe and Ito 2008, "Color Universal Design": no yellow on white, and in the dark the brighter of similar hues first.
_LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DARK = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442", "#FFFFFF")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    """Colours of a figure."""

    text: str
    grid: str
    background: str
    series: tuple[str, ...]


PAPER = Theme(text="#1a1a1a", grid="#dddddd", background="#ffffff", series=_LIGHT)
LIGHT = Theme(text="#3a4048", grid="#dfe2e6", background="none", series=_LIGHT)
DARK = Theme(text="#c3c8cf", grid="#343a42", background="none", series=_DARK)


def accuracy_figure(groups: Sequence[Group]) -> Figure:
    """Draw held-out accuracy against steps, tokens and time, side by side, for paper."""
    with _styled(PAPER):
        figure = _figure(8.7, 2.7)
        row = figure.subplots(1, len(AXES), sharey=True)
        for ax, axis in zip(row, AXES, strict=True):
            _draw_accuracy(ax, groups, axis, PAPER)
        row[0].set_ylabel("Held-out accuracy (%)")
        _legend(figure, groups, PAPER)
    return figure


def overview_figure(groups: Sequence[Group], theme: Theme = PAPER) -> Figure:
    """Draw held-out accuracy above training reward, against steps, tokens and time."""
    with _styled(theme):
        figure = _figure(10, 5.4)
        rows = figure.subplots(2, len(AXES), sharex="col", sharey="row", squeeze=False)
        for column, axis in enumerate(AXES):
            _draw_accuracy(rows[0, column], groups, axis, theme)
            _draw_reward(rows[1, column], groups, axis, theme)
            rows[0, column].set_xlabel("")
        rows[0, 0].set_ylabel("Held-out accuracy (%)")
        rows[1, 0].set_ylabel("Training reward")
        figure.align_ylabels()
        _legend(figure, groups, theme)
    return figure


def signal_figure(run: Run, theme: Theme) -> Figure:
    """Draw what the steps of a run learn from: the share of problems that tied, and the answers' accuracy.

    The accuracy of the weights on held-out problems, which are not those of a step, is drawn beside it.
    """
    steps = [row for row in run.rows if row["step"]]
    with _styled(theme):
        figure = _figure(10, 2.9)
        tied, accuracy = figure.subplots(1, 2, squeeze=True)
        for ax, key, of, name in (
            (tied, "prompts/tied", run.config.problems_per_step, "Problems with tied rewards (%)"),
            (accuracy, "reward/accuracy", 1, "Accuracy (%)"),
        ):
            x, y = (
                np.array(column, dtype=np.float64)
                for column in ([r["step"] for r in steps], [number(r, key) for r in steps])
            )
            x, y = x[np.isfinite(y)], 100 * y[np.isfinite(y)] / of
            stride = _stride(len(x)) or 1
            ax.scatter(x[::stride], y[::stride], s=5, color=theme.series[0], alpha=0.45, linewidths=0)
            if len(x):
                ax.plot(x, running_mean(y, _window(len(y))), color=theme.series[0], linewidth=1.6, label=ANSWERS)
            ax.set_ylabel(name)
            ax.set_xlabel("Training steps")
            ax.margins(x=0.03)
            ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        tied.set_ylim(-3, 103)
        x, y = _curve(run.evaluations, "step", "accuracy", 1, 100)
        look = {"color": theme.series[1], "linestyle": _DASHES[1], "linewidth": 1.3, "marker": "o", "markersize": 3.5}
        accuracy.plot(x, y, label="weights, held-out problems", **look)
        accuracy.legend(frameon=False)
    return figure


def caption(groups: Sequence[Group]) -> str:
    """Return a caption that explains the lines, bands and whiskers of a figure of these groups."""
    seeds = max(len(group.runs) for group in groups) > 1
    parts = ["Accuracy on held-out problems, greedy decoding."]
    if seeds:
        parts.append(
            "Thick lines: mean over the seeds of a group; bands: from the lowest to the highest seed, where all seeds "
            "have values, interpolated between evaluations; thin lines: single seeds, with a dot at each evaluation."
        )
    if _has_whiskers(groups):
        parts.append("Whiskers: 95 % intervals over problems (Wilson).")
    if lines := _references(groups):
        parts.append(f"Horizontal lines: {' and '.join(name for _, name, _ in lines)}.")
    rewards = {run.name: len(_rewards(run, "step", 1)[0]) for group in groups for run in group.runs}
    if any(rewards.values()):
        strides, windows = ({f(n) for n in rewards.values() if n} for f in (_stride, _window))
        thinned = f", of one step in {_range(strides)}" if max(strides) > 1 else ""
        means = ", averaged over seeds" if seeds else ""
        parts.append(
            f"Training reward: dots are means of a step{thinned}, lines running means over {_range(windows)} "
            f"steps{means}. Each step has different problems, so its reward also varies with their difficulty; "
            "accuracy shows whether the model improves."
        )
    if missing := [name for name, n in rewards.items() if not n]:
        parts.append(f"No training reward was recorded for {', '.join(missing)}.")
    parts.append("Tokens are generated tokens; time is training time, without evaluations.")
    return " ".join(parts)


def write_png(figure: Figure, path: Path) -> None:
    """Write an image for print; after an error the old file is still there. Raises OSError."""
    staging = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with _styled(PAPER):
            figure.savefig(staging, format="png", dpi=DPI, metadata={"Software": None})
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def svg(figure: Figure) -> str:
    """Return the figure as SVG with letters as outlines, so that it looks the same everywhere."""
    buffer = io.StringIO()
    with _styled(PAPER):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()


def running_mean(values: Array, window: int) -> Array:
    """Return the mean of the finite values among the `window` (odd) nearest; fewer at the ends, NaN without any."""
    kernel = np.ones(min(window, 2 * len(values) - 1))
    finite = np.isfinite(values)
    half = len(kernel) // 2
    sums, counts = (
        np.convolve(row, kernel)[half : half + len(values)] for row in (np.where(finite, values, 0.0), finite * 1.0)
    )
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0.5)


def on_common_grid(curves: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Return x [X] and values [curves, X] over the range that all curves cover; X is 0 without such a range.

    The grid has every x of every curve within the range, where the mean has its corners, and 200 more for the band.
    """
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if low > high:
        return np.empty(0), np.empty((len(curves), 0))
    grid = np.unique(np.concatenate([np.linspace(low, high, 200), *(x for x, _ in curves)]))
    grid = grid[(grid >= low) & (grid <= high)]
    return grid, np.stack([np.interp(grid, x, y) for x, y in curves])


@contextlib.contextmanager
def _styled(theme: Theme) -> Iterator[None]:
    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8.5,
        "text.color": theme.text,
        "text.parse_math": False,  # a dollar sign in a name is one
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.text,
        "axes.facecolor": theme.background,
        "figure.facecolor": theme.background,
        "savefig.facecolor": "auto",
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "xtick.major.width": 0.7,
        "lines.solid_capstyle": "round",
        "svg.fonttype": "path",
        "svg.hashsalt": "eggroll-llm",
    }
    with matplotlib.rc_context(style):
        yield


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.04, hspace=0.03))
    FigureCanvasAgg(figure)
    return figure


def _draw_accuracy(ax: Axes, groups: Sequence[Group], axis: Axis, theme: Theme) -> None:
    factor, unit = _unit(groups, axis)
    for value, _, dash in _references(groups):
        ax.axhline(100 * value, color=theme.text, linestyle=dash, linewidth=0.9, zorder=1.5)
    for i, group in enumerate(groups):
        color, dash = _look(i, theme)
        curves = [_curve(run.evaluations, axis, "accuracy", factor, 100) for run in group.runs]
        if len(curves) > 1:
            _draw_seeds(ax, curves, color, dash)
            continue
        ((x, y),) = curves
        ax.plot(x, y, color=color, linestyle=dash, linewidth=1.6, marker="o", markersize=3.5, clip_on=False, zorder=3)
        if _has_whiskers(groups):
            # By x as `_curve` has it: of evaluations at the same one the last counts.
            ends = {getattr(p, axis): wilson(p.accuracy, p.problems) for p in group.runs[0].evaluations}
            error = np.abs(100 * np.array(list(ends.values())).T - y)
            ax.errorbar(x, y, yerr=error, fmt="none", ecolor=color, elinewidth=0.9, alpha=0.55)
    _label(ax, axis, unit, groups)


def _draw_reward(ax: Axes, groups: Sequence[Group], axis: Axis, theme: Theme) -> None:
    factor, unit = _unit(groups, axis)
    for i, group in enumerate(groups):
        color, dash = _look(i, theme)
        smooth = []
        for run in group.runs:
            x, y = _rewards(run, axis, factor)
            if not len(x):
                continue
            stride = _stride(len(x))
            size, faint = 5 if len(groups) < 4 else 2, 0.45 / len(group.runs) ** 0.5
            ax.scatter(x[::stride], y[::stride], s=size, color=color, alpha=faint, linewidths=0)
            smooth.append((x, running_mean(y, _window(len(y)))))
        if smooth:
            x, values = on_common_grid(smooth)
            ax.plot(x, values.mean(axis=0), color=color, linestyle=dash, linewidth=1.6)
    _label(ax, axis, unit, groups)


def _label(ax: Axes, axis: Axis, unit: str, groups: Sequence[Group]) -> None:
    ax.set_xlabel(unit)
    ax.margins(x=0.03)
    if axis == "step":
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    if not any(run.points[-1].step for group in groups for run in group.runs):
        ax.set_xlim(-0.05, 1)  # with nothing but a point at 0 there is no scale
        ax.set_xticks([0])


def _draw_seeds(ax: Axes, curves: Sequence[tuple[Array, Array]], color: str, dash: Any) -> None:
    for x, y in curves:
        ax.plot(x, y, color=color, linewidth=0.7, alpha=0.45, marker="o", markersize=2)
    grid, values = on_common_grid(curves)
    marker = "o" if len(grid) == 1 else None  # a line of one point is invisible
    ax.fill_between(grid, values.min(axis=0), values.max(axis=0), color=color, alpha=0.16, linewidth=0)
    mean = values.mean(axis=0)
    ax.plot(grid, mean, color=color, linestyle=dash, linewidth=2, marker=marker, markersize=4, zorder=3)


def _curve(points: Sequence[Point], axis: Axis, value: str, factor: float, scale: float) -> tuple[Array, Array]:
    """Finite values with their x, which must rise for interpolation: of equal ones the last counts."""
    pairs = {getattr(point, axis) / factor: scale * getattr(point, value) for point in points}
    x, y = (np.array(list(column), dtype=np.float64) for column in (pairs.keys(), pairs.values()))
    return x[np.isfinite(y)], y[np.isfinite(y)]


def _rewards(run: Run, axis: Axis, factor: float) -> tuple[Array, Array]:
    return _curve([point for point in run.points if point.step], axis, "reward", factor, 1)


def _stride(rewards: int) -> int:
    """Return n such that every n-th reward is drawn."""
    return -(-rewards // RAW_POINTS)


def _window(rewards: int) -> int:
    """Return the window of the running mean: a tenth of the rewards, odd, at least 3."""
    return max(3, rewards // 10) | 1


def _range(numbers: Collection[int]) -> str:
    return f"{min(numbers)}" if len(set(numbers)) == 1 else f"{min(numbers)} to {max(numbers)}"


def _unit(groups: Sequence[Group], axis: Axis) -> tuple[float, str]:
    """Return the divisor of x and the label of the axis."""
    largest = max(getattr(run.points[-1], axis) for group in groups for run in group.runs)
    if axis == "step":
        return 1, "Training steps"
    if axis == "tokens":
        factor, name = (1e6, " (millions)") if largest >= 2e6 else (1e3, " (thousands)") if largest >= 2e3 else (1, "")
        return factor, f"Generated tokens{name}"
    factor, name = (3600, "hours") if largest >= 3 * 3600 else (60, "minutes") if largest >= 180 else (1, "seconds")
    return factor, f"Training time ({name})"


def _look(i: int, theme: Theme) -> tuple[str, Any]:
    """Colour and dashes of a group: when the colours are used up, the dashes change."""
    return theme.series[i % len(theme.series)], _DASHES[i // len(theme.series) % len(_DASHES)]


def _common_base(groups: Sequence[Group]) -> float | None:
    """Accuracy of the base model where all runs measured the same."""
    found = {run.base.accuracy if run.base else None for group in groups for run in group.runs}
    return found.pop() if len(found) == 1 else None


def _references(groups: Sequence[Group]) -> list[tuple[float, str, Any]]:
    """Return the lines that curves are read next to: accuracy, name and dashes."""
    base, constants = _common_base(groups), constants_of([run for group in groups for run in group.runs])
    lines = [(base, "base model", (0, (1, 2)))] if base is not None else []
    return [*lines, *((each.accuracy, f"best constant answer: {each.pattern}", (0, (5, 3))) for each in constants)]


def _has_whiskers(groups: Sequence[Group]) -> bool:
    lone: list[Run] = [run for group in groups if len(group.runs) == 1 for run in group.runs]
    return 0 < len(lone) <= WHISKERS


def _legend(figure: Figure, groups: Sequence[Group], theme: Theme) -> None:
    named = [] if len(groups) == 1 and len(groups[0].runs) == 1 else groups  # a lone curve needs no name
    looks = [(*_look(i, theme), group.label, 2.0) for i, group in enumerate(named)]
    looks += [(theme.text, dash, name, 0.9) for _, name, dash in _references(groups)]
    if not looks:
        return
    lines = [Line2D([], [], color=color, linestyle=dash, linewidth=width) for color, dash, _, width in looks]
    # Letters that the font lacks would be boxes, with a warning for each.
    letters = get_font(findfont("DejaVu Sans")).get_charmap()
    labels = ["".join(c if ord(c) in letters else ascii(c)[1:-1] for c in name) for _, _, name, _ in looks]
    widest = 0.55 + 0.066 * max(map(len, labels))  # inches
    columns = max(1, min(len(labels), int(figure.get_figwidth() / widest)))
    figure.legend(
        lines, labels, loc="outside upper left", ncols=columns, frameon=False, handlelength=2.2, columnspacing=1.6
    )
