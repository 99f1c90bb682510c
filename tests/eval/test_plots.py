"""Figures: the numbers that are drawn, and that drawing needs no display, leaves no trace and is reproducible."""

import struct
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from made_up_runs import make_config, write_run
from numpy.testing import assert_allclose

from eggroll_llm.config.schema import LogConfig
from eggroll_llm.records.accuracy import wilson
from eval import plots
from eval.runs import Group, group_seeds, read_runs

# Neither a package nor on the path: test modules are imported by their files.


def seeds(folder: Path) -> list[Group]:
    """Two seeds that are evaluated at different steps, the second faster."""
    first = write_run(folder / "a", {0: "0000", 2: "1100", 4: "1111"}, config=make_config(seed=0))
    second = write_run(folder / "b", {0: "0000", 4: "1100"}, config=make_config(seed=1), spent=(10, 100, 30.0))
    return group_seeds(read_runs([first, second]))


def test_running_mean_by_hand() -> None:
    assert_allclose(plots.running_mean(np.array([1.0, 2, 6, 4, 5]), 3), [1.5, 3, 4, 5, 4.5])
    assert_allclose(plots.running_mean(np.array([1.0, np.nan, 6]), 3), [1, 3.5, 6])
    assert_allclose(plots.running_mean(np.array([1.0, 3]), 101), [2, 2])
    assert_allclose(plots.running_mean(np.array([7.0]), 3), [7])
    assert_allclose(plots.running_mean(np.array([np.nan, np.nan, 2]), 1), [np.nan, np.nan, 2])


def test_curves_meet_where_all_have_values() -> None:
    long = (np.array([0.0, 2, 4]), np.array([0.0, 2, 0]))
    short = (np.array([1.0, 3]), np.array([1.0, 5]))
    grid, values = plots.on_common_grid([long, short])
    assert (grid[0], grid[-1]) == (1, 3)
    at = {float(x): values[:, i].tolist() for i, x in enumerate(grid)}
    assert (at[1.0], at[2.0], at[3.0]) == ([1, 1], [2, 3], [1, 5])
    grid, values = plots.on_common_grid([(np.array([0.0, 1]), np.zeros(2)), (np.array([2.0, 3]), np.zeros(2))])
    assert (len(grid), values.shape) == (0, (2, 0))


def test_seeds_are_drawn_as_mean_band_and_lines(tmp_path: Path) -> None:
    """After two steps: 50 % and, between 0 and 50, 25 %. At the end: 100 % and 50 %."""
    figure = plots.accuracy_figure(seeds(tmp_path))
    ax = figure.axes[0]
    first, second, mean = (line.get_xydata() for line in ax.lines[2:])
    assert_allclose(first, [[0, 0], [2, 50], [4, 100]])
    assert_allclose(second, [[0, 0], [4, 50]])
    assert_allclose(mean[mean[:, 0] == 2], [[2, 37.5]])
    assert_allclose(mean[-1], [4, 75])
    (band,) = ax.collections
    vertices = band.get_paths()[0].vertices
    assert set(vertices[vertices[:, 0] == 4][:, 1]) == {50, 100}
    assert set(vertices[vertices[:, 0] == 2][:, 1]) == {25, 50}
    assert [line.get_ydata()[0] for line in ax.lines[:2]] == [0, 100]  # base model, best constant answer
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["es (2 seeds)", "base model", "best constant answer: a + b"]


def test_seeds_share_a_range_of_time(tmp_path: Path) -> None:
    """The slow one takes four minutes, the quick one two: there the slow one is at 50 %, the quick one too."""
    ax = plots.accuracy_figure(seeds(tmp_path)).axes[2]
    assert_allclose(ax.lines[-1].get_xydata()[-1], [2, 50])
    assert ax.get_xlabel() == "Training time (minutes)"


def test_a_single_run_has_whiskers_of_its_intervals(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "run", {0: "0011", 4: "0111"})])
    ax = plots.accuracy_figure(group_seeds(runs)).axes[1]
    assert_allclose(ax.lines[2].get_xydata(), [[0, 50], [400, 75]])
    (whiskers,) = ax.collections
    low_high = [segment[:, 1] for segment in whiskers.get_segments()]
    assert_allclose(low_high, [100 * np.array(wilson(0.5, 4)), 100 * np.array(wilson(0.75, 4))])
    assert ax.get_xlabel() == "Generated tokens"


def test_reward_is_drawn_raw_and_smoothed(tmp_path: Path) -> None:
    """Rewards 0.1 to 0.4 over four steps, smoothed over three."""
    runs = read_runs([write_run(tmp_path / "run", {0: "01", 4: "11"}, spent=(1, 1_000_000, 4000.0))])
    figure = plots.overview_figure(group_seeds(runs))
    ax = figure.axes[4]
    assert_allclose(ax.collections[0].get_offsets(), [[1, 0.1], [2, 0.2], [3, 0.3], [4, 0.4]])
    smooth = ax.lines[0].get_xydata()
    assert_allclose(smooth[np.isin(smooth[:, 0], [1, 2, 3, 4])], [[1, 0.15], [2, 0.2], [3, 0.3], [4, 0.35]])
    assert [ax.get_xlabel() for ax in figure.axes] == [
        *[""] * 3,
        "Training steps",
        "Generated tokens (millions)",
        "Training time (hours)",
    ]
    assert [ax.get_ylabel() for ax in figure.axes] == ["Held-out accuracy (%)", "", "", "Training reward", "", ""]


def test_twelve_groups_look_different(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / f"{i}", {0: "01", 2: "11"}, config=make_config(sigma=0.01 * (i + 1))) for i in range(12)
    ]
    figure = plots.accuracy_figure(group_seeds(read_runs(paths)))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()[:12]] == [
        f"es sigma={0.01 * (i + 1):.6g} (1 seed)" for i in range(12)
    ]
    assert len({(line.get_color(), line.get_linestyle(), line.is_dashed()) for line in legend.get_lines()[:12]}) == 12
    assert not figure.axes[0].collections  # whiskers of twelve runs would hide each other


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    """A dollar sign starts no formula, an underscore hides no label, a missing letter warns of nothing."""
    configs = [make_config(task=task) for task in ("$\\frac$_{.py:T", "_模\u202e\x1b.py:T")]
    paths = [write_run(tmp_path / f"{i}", {0: "01", 2: "11"}, config=config) for i, config in enumerate(configs)]
    figure = plots.accuracy_figure(group_seeds(read_runs(paths)))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:2] == ["es task=$\\frac$_{.py:T (1 seed)", "es task=_\\u6a21\\u202e\\x1b.py:T (1 seed)"]
    configs = [make_config(task=f"é{'long' * 9}{i}.py:T") for i in range(2)]
    paths = [write_run(tmp_path / f"cut{i}", {0: "01", 2: "11"}, config=config) for i, config in enumerate(configs)]
    figure = plots.accuracy_figure(group_seeds(read_runs(paths)))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:2] == [f"es task=é{'long' * 5}lo… #{i} (1 seed)" for i in (1, 2)]
    assert plots.svg(figure).count("<svg") == 1


@pytest.mark.parametrize("right", [{0: "01"}, {2: "1"}, {0: "1", 1: "0"}])
def test_little_is_drawn_too(tmp_path: Path, right: dict[int, str]) -> None:
    """No step yet, no base model, one problem."""
    path = tmp_path / "run"
    if len(right[max(right)]) == 1:
        write_run(path, {step: marks + marks for step, marks in right.items()})
    else:
        write_run(path, right)
    figure = plots.overview_figure(group_seeds(read_runs([path])))
    assert len(ElementTree.fromstring(plots.svg(figure))) > 0
    points = figure.axes[0].lines[-1].get_xydata()
    assert points[:, 0].tolist() == sorted(right)


def test_gaps_in_the_reward_are_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {0: "01", 4: "11"})
    text = (path / "metrics.jsonl").read_text().replace('"reward/mean": 0.2', '"reward/mean": null')
    (path / "metrics.jsonl").write_text(text)
    figure = plots.overview_figure(group_seeds(read_runs([path])))
    assert_allclose(figure.axes[3].collections[0].get_offsets(), [[1, 0.1], [3, 0.3], [4, 0.4]])


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    groups = seeds(tmp_path)
    for theme in (plots.LIGHT, plots.DARK):
        text = plots.svg(plots.overview_figure(groups, theme))
        assert text == plots.svg(plots.overview_figure(groups, theme))
        assert theme.text in text
        assert "<text" not in text
        assert "<dc:date" not in text
        assert "<script" not in text


def test_png_has_200_dots_an_inch(tmp_path: Path) -> None:
    groups = seeds(tmp_path)
    sizes = {}
    for name, figure in {
        "overview": plots.overview_figure(groups),
        "accuracy": plots.accuracy_figure(groups),
    }.items():
        plots.write_png(figure, tmp_path / f"{name}.png")
        header = (tmp_path / f"{name}.png").read_bytes()[:24]
        assert header.startswith(b"\x89PNG")
        sizes[name] = struct.unpack(">II", header[16:])
    assert sizes == {"overview": (2000, 1080), "accuracy": (1740, 540)}
    assert not list(tmp_path.glob(".tmp*"))


def test_a_failed_image_leaves_the_old_one(tmp_path: Path) -> None:
    figure = plots.accuracy_figure(seeds(tmp_path))
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OSError, match="taken"):
        plots.write_png(figure, tmp_path / "taken.png")
    assert [path.name for path in tmp_path.iterdir() if "taken" in path.name] == ["taken.png"]


def test_drawing_leaves_no_trace(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plots.svg(plots.overview_figure(seeds(tmp_path)))
    assert dict(matplotlib.rcParams) == before
    code = "import sys, eval.plots; print('matplotlib.pyplot' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert result.stdout == "False\n"


def test_the_caption_says_what_is_drawn(tmp_path: Path) -> None:
    several = plots.caption(seeds(tmp_path))
    assert "bands: from the lowest to the highest seed" in several
    assert "Whiskers" not in several
    other = make_config(seed=5, log=LogConfig(samples=0))
    one = plots.caption(group_seeds(read_runs([write_run(tmp_path / "one", {0: "01"}, config=other)])))
    assert "Whiskers: 95 % intervals over problems (Wilson)." in one
    assert "Horizontal lines: base model and best constant answer: a + b." in one
    assert "bands" not in one
    assert "No training reward was recorded for one." in one


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((4, 4), "dots are means of a step, lines running means over 3 steps, averaged over seeds."),
        ((40, 90), "dots are means of a step, lines running means over 5 to 9 steps, averaged over seeds."),
        ((350, 700), "dots are means of a step, of one step in 2 to 3, lines running means over 35 to 71 steps, avera"),
    ],
)
def test_the_caption_says_how_the_reward_is_drawn(tmp_path: Path, steps: tuple[int, int], said: str) -> None:
    paths = [
        write_run(tmp_path / f"{seed}", {0: "01", n: "11"}, config=make_config(seed=seed))
        for seed, n in enumerate(steps)
    ]
    groups = group_seeds(read_runs(paths))
    assert f"Training reward: {said}" in plots.caption(groups)
    assert "Each step has different problems, so its reward also varies with" in plots.caption(groups)
    ax = plots.overview_figure(groups).axes[3]
    for n, dots in zip(steps, ax.collections, strict=True):
        assert len(dots.get_offsets()) == len(range(0, n, -(-n // 300)))


def test_seeds_have_a_dot_at_each_evaluation(tmp_path: Path) -> None:
    ax = plots.accuracy_figure(seeds(tmp_path)).axes[0]
    assert [line.get_marker() for line in ax.lines[2:]] == ["o", "o", "None"]
