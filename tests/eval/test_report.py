"""Reports: what they say, that they load nothing, that no text of a run can act, and that a browser agrees."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_up_runs import PROBLEMS, make_config, write_run
from matplotlib.image import imread

from eggroll_llm.errors import RunDirError
from eval import plots, report
from eval.compare import compare_runs
from eval.report import write_run_report
from eval.runs import read_runs

# Neither a package nor on the path: test modules are imported by their files.

MARKUP = "</script><img src=x onerror=alert(1)>"
HOSTILE = f"{MARKUP}\x1b[31m\u202eevil\x00\u2066&amp;"
INERT = rf"{MARKUP}\x1b[31m\u202eevil\x00\u2066&amp;"
SURROGATE = "SURROGATE"

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are drawn sooner; their resolution is tested with the figures."""
    monkeypatch.setattr(plots, "DPI", 20)


def write_comparison(paths: list[Path], out: Path) -> Path:
    runs = read_runs(paths)
    return report.write_comparison(runs, compare_runs(runs), out)


class Page(HTMLParser):
    """Elements, attributes and visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def two_runs(folder: Path) -> list[Path]:
    return [
        write_run(folder / "a", {0: "10001000", 2: "11001000", 4: "01111010"}, config=make_config(seed=0)),
        write_run(folder / "b", {0: "10001000", 4: "11111111"}, config=make_config(seed=1)),
    ]


def hostile_run(folder: Path) -> Path:
    """A run with such text in its name, its settings, its problems and its completions."""
    problems = [{"id": HOSTILE, "numbers": [1], HOSTILE: HOSTILE}, *PROBLEMS[1:]]
    name = HOSTILE.replace("/", "").replace("\x00", "")
    config = make_config(model=HOSTILE.replace("\x00", ""), task_options={"note": HOSTILE})
    path = write_run(
        folder / name,
        {0: "00", 4: "10"},
        config=config,
        problems=problems,
        answer=lambda step, i, correct: f"{HOSTILE}\nsecond line {SURROGATE}",
    )
    row = {"step": 4, "problem": HOSTILE, "completion": HOSTILE, "correct": False}
    (path / "completions.jsonl").write_text(json.dumps(row) + "\n")
    (path / "environment.json").write_text(json.dumps({"starts": [{HOSTILE: HOSTILE, "packages": {HOSTILE: 1}}]}))
    for file in (path / "evaluations").iterdir():
        file.write_text(file.read_text().replace(SURROGATE, "\\ud800"))
    return path


def test_a_run_report_has_each_reward_of_a_sum(tmp_path: Path) -> None:
    run, _ = two_runs(tmp_path)
    assert "before its weight" not in Page(write_run_report(run)).text
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows[1:]:
        row |= {"rewards/right/mean": row["step"] / 8} | ({"rewards/short/mean": 0.5} if row["step"] > 2 else {})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = " ".join(Page(write_run_report(run)).text.split())
    assert "rewardfirst 2 stepslast 2 steps right0.1880.438 short–0.500" in words


def test_a_run_report_says_what_was_reached(tmp_path: Path) -> None:
    run, _ = two_runs(tmp_path)
    path = write_run_report(run)
    assert path == run / "report.html"
    assert sorted(file.name for file in (run / "figures").iterdir()) == ["accuracy.png", "overview.png"]
    text = Page(path).text
    words = " ".join(text.split())
    assert "Accuracy on 8 held-out problems went from 25.0 % to 62.5 % in 4 steps and 4.0 minutes of training" in words
    assert "+37.5 percentage points (p = 0.38); fewer than 10 problems changed, too few for an interval." in words
    assert "Of 8 problems, a, step 4 solves 4 more often than a, base model, and 1 less often: p = 0.38" in words
    assert "numbers: [1, 2]\ntarget: 3" in text
    assert "4:1:right" in text
    assert "said at 4" in text
    assert "said at 3" not in text
    assert "sample45.00075.0 %" in words
    assert "update7.50012.5 %" in words
    assert "other7.50012.5 %" in words
    assert "both42810.7" in words  # 4 steps of 7 prompt and 100 generated tokens, 40 completions
    assert "learning_rate = 0.001" in text
    assert "eggroll-llm train a/config.toml --run-dir NEW_RUN\neggroll-llm replay a --out NEW_MODEL" in text
    journal = (run / "journal.jsonl").read_bytes()
    assert hashlib.sha256(journal).hexdigest() in text
    assert f"The journal has {len(journal)} B (the model in final/ 2.05 kB); its SHA-256 is" in words
    assert "torch2.13.0" in words


def test_a_comparison_says_what_the_tables_say(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    path = write_comparison(two_runs(tmp_path), out)
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()) == [
        "comparison.json",
        "figures/accuracy.png",
        "figures/overview.png",
        "report.html",
    ]
    words = " ".join(Page(path).text.split())
    assert "Final accuracy: 81.2 ± 18.8 %. Means over seeds ± standard error over seeds." in words
    assert "b, base model → step 4: 6 won, 0 lost" in words
    for title in (
        "Accuracy of each run",
        "What each run spent",
        "Same settings, different seeds",
        "Paired tests on the same problems",
        "Accuracy at the same completions: 40",
        "Accuracy at the same tokens: 400",
        "Accuracy at the same time: 4.0 minutes",
    ):
        assert title in words
    assert json.loads((out / "comparison.json").read_text())["groups"][0]["final"]["value"] == 0.8125


def test_groups_are_ranked_at_equal_budgets_and_not_by_what_they_reached_in_the_end(tmp_path: Path) -> None:
    """The long run is best in the end; with what the short one spent it is worse, but has fewer completions then."""
    short = write_run(tmp_path / "short", {0: "0000", 2: "1100"}, config=make_config(steps=2))
    long = write_run(tmp_path / "long", {0: "0000", 2: "1000", 4: "1110", 8: "1111"}, spent=(5, 100, 60.0))
    words = " ".join(Page(write_comparison([short, long], tmp_path / "out")).text.split())
    assert (
        "Highest accuracy: es steps=4 (1 seed), 75.0 % at the same completions; es steps=2 (1 seed), 50.0 % at the "
        "same tokens, 50.0 % at the same time." in words
    )
    assert "es steps=4 (1 seed)25.0 %at the same tokens; final 100.0 %; base model 0.0 %" in words
    assert "es steps=2 (1 seed)50.0 %at the same tokens; final 50.0 %; base model 0.0 %" in words


def test_runs_that_cannot_be_compared_are_not_ranked(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / "a", {0: "00", 4: "10"}),
        write_run(tmp_path / "b", {0: "00", 4: "11"}, base_model="f" * 16, config=make_config(seed=1)),
    ]
    words = " ".join(Page(write_comparison(paths, tmp_path / "out")).text.split())
    assert "The accuracies of these runs are not comparable: see the notes." in words
    assert "they differ in base model" in words
    for absent in ("Highest accuracy", "Final accuracy", "Same settings, different seeds", "Accuracy at the"):
        assert absent not in words


def test_nothing_solved_is_not_known_exactly(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {0: "0" * 8, 4: "1" * 8})
    for page in (write_run_report(path), write_comparison([path], tmp_path / "out")):
        text = Page(page).text
        assert "0.0 % [0.0, 32.4]" in text
        assert "100.0 % [67.6, 100.0]" in text
        assert "± 0.0" not in text


def test_the_headline_is_what_the_test_found(tmp_path: Path) -> None:
    """An answer of each evaluation was lost: three of four problems are compared."""
    path = write_run(tmp_path / "run", {0: "1000", 2: "1101"})
    for file in (path / "evaluations").iterdir():
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    words = " ".join(Page(write_run_report(path)).text.split())
    assert "Accuracy on 3 held-out problems went from 33.3 % to 66.7 % in 2 steps" in words
    assert "+33.3 percentage points (p = 1)" in words
    assert "run, step 2: 3 answers are recorded, its accuracy is of 4 problems" in words


def test_only_our_own_names_are_replaced(tmp_path: Path) -> None:
    runs, out = two_runs(tmp_path), tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    for name in ("notes.txt", "figures/mine.png"):
        (out / name).write_text("keep")
    (out / "report.html").write_text("old")
    write_comparison(runs, out)
    first = (out / "report.html").read_text()
    assert first.startswith("<!doctype html>")
    assert write_comparison(runs, out).read_text() == first
    assert [(out / name).read_text() for name in ("notes.txt", "figures/mine.png")] == ["keep", "keep"]
    assert not list(out.rglob(".tmp*"))


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {0: "10"}, finished=False)
    (path / "completions.jsonl").unlink()
    shutil.rmtree(path / "evaluations")
    words = " ".join(Page(write_run_report(path)).text.split())
    assert "The base model's accuracy is 50.0 % on 2 held-out problems." in words
    assert "its final accuracy is that of step 0" in words
    for absent in ("Answers that changed", "Time and tokens", "Last completions", "final/"):
        assert absent not in words


def test_the_headline_is_of_the_last_evaluation(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {0: "10", 4: "11"}, steps=6, finished=False)
    words = " ".join(Page(write_run_report(path)).text.split())
    assert "Base model: SmolLM2-135M-Instruct, 4-bit GGUF expanded to bfloat16. The best constant answer to" in words
    assert "went from 50.0 % to 100.0 % in 4 steps and 4.0 minutes of training: +50.0 percentage points" in words
    problems = [{"id": i} for i in range(12)]
    path = write_run(tmp_path / "clear", {0: "0" * 12, 2: "1" * 11 + "0"}, problems=problems)
    words = " ".join(Page(write_run_report(path)).text.split())
    assert re.search(r"\+91\.7 percentage points \(95 % interval \+75\.0 to \+100\.0, p = 0\.00098\)\. ", words)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match=r"file: cannot write the report"):
        write_comparison(two_runs(tmp_path), tmp_path / "file")


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    page_path = write_run_report(hostile_run(tmp_path))
    page, source = Page(page_path), page_path.read_text()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("content", policy) in page.attributes
    assert ("lang", "en") in page.attributes
    loaded = [value for name, value in page.attributes if name in ("src", "srcset", "href", "action", "data", "poster")]
    assert [value[:26] for value in loaded] == ["data:image/svg+xml;base64,"] * 2
    for value in loaded:
        picture = base64.b64decode(value[26:]).decode()
        assert re.findall(r"href\s*=\s*\"(?!#)", picture) == []
        assert re.findall(r"url\((?!#)|@import|<script|<foreignObject| on\w+=", picture) == []
    style = source.partition("<style>")[2].partition("</style>")[0]
    assert not re.search(r"url\(|@import|image\(|src:", style)
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "a"} & set(page.tags)
    assert [name for name, _ in page.attributes if name.startswith("on")] == []
    assert page.open == []


def test_text_of_a_run_stays_text(tmp_path: Path) -> None:
    run = hostile_run(tmp_path)
    for path in (write_run_report(run), write_comparison([run], tmp_path / "out")):
        source = path.read_bytes().decode("utf-8")
        assert {char for char in source if not char.isprintable()} == {"\n"}
        page = Page(path)
        assert page.tags.count("img") == 1
        assert "script" not in page.tags
        assert f"{INERT}: {INERT}" in page.text  # problem
        assert f"{INERT}\nsecond line \\ud800" in page.text  # completions
        assert INERT.replace("/", "").replace("\\x00", "") in page.text  # name
    page = Page(run / "report.html")
    assert page.text.count(INERT) > 5
    assert 'note = "</script><img src=x onerror=alert(1)>' in page.text  # settings


def test_a_megabyte_of_completion_is_cut_and_settings_are_not(tmp_path: Path) -> None:
    config = make_config(task_options={"note": "y" * 5000})
    path = write_run(tmp_path / "run", {0: "00", 4: "10"}, config=config, answer=lambda *_: "x" * 1_000_000)
    text = Page(write_run_report(path)).text
    assert "x" * 4000 + "…" in text
    assert "x" * 4001 not in text
    assert "y" * 5000 in text


def browse(page: Path, folder: Path, *, dark: bool) -> tuple[list[str], np.ndarray]:
    """Return the console messages of the page, and a screenshot [height, width, 3] from 0 to 255."""
    image = folder / f"{'dark' if dark else 'light'}.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0", "--window-size=1000,1200"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--screenshot={image}", page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    messages = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return messages, np.rint(imread(image)[..., :3] * 255).astype(int)


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_a_browser_shows_it_light_and_dark_and_has_nothing_to_complain_about(tmp_path: Path) -> None:
    page = write_run_report(hostile_run(tmp_path))
    for dark, background, line in ((False, (255, 255, 255), (0, 114, 178)), (True, (20, 23, 27), (86, 180, 233))):
        messages, pixels = browse(page, tmp_path, dark=dark)
        assert messages == []
        assert tuple(pixels[0, 0]) == background
        # The curve's colour is nowhere but in the figure, which was loaded, then, and is the one of this scheme.
        assert (np.abs(pixels - line).max(axis=2) <= 1).sum() > 100


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_the_browser_would_complain_about_a_script(tmp_path: Path) -> None:
    """The policy blocks what could have slipped through, and `browse` hears of it."""
    page = write_run_report(hostile_run(tmp_path))
    page.write_text(page.read_text().replace("</main>", "<script>console.error(1)</script></main>"))
    messages, _ = browse(page, tmp_path, dark=False)
    assert len(messages) == 1
    assert "Content Security Policy" in messages[0]
