"""The page of a run that goes on: what it says at each point, that no text on it acts, and how a browser renews it."""

import base64
import hashlib
import html
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import make_config, write_run
from process_tree import listen

from eggroll_llm.errors import RunDirError
from eggroll_llm.records.lock import RunLock
from eggroll_llm.records.run_dir import LOCK
from eggroll_llm.system.local_page import LocalPage
from eggroll_llm.system.terminal import inert
from eval import live
from eval.live import POLICY, LivePage, live_page
from eval.page import render

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m\u202e"


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of the time; that they are drawn is tested once, in `test_the_signal`."""
    monkeypatch.setattr("eval.report._data_uri", lambda figure: "data:,")


class Tags(HTMLParser):
    """Tag, name and value of each attribute of a page, and each tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(tag, "", ""), *((tag, name, value or "") for name, value in attrs)]


def status(page: str) -> str:
    (text,) = re.findall(r'<p class="status" role="status">(.*?)</p>', page, re.DOTALL)
    return html.unescape(text)


def words(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page.partition("<body>")[2])).split())


def test_what_it_says_from_before_the_start_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "IDLE", 0)
    path = tmp_path / "run"
    page = LivePage(path)
    assert status(page()) == f"waiting: {path} holds no run yet"
    write_run(path, {0: "10"}, config=make_config(steps=50), finished=False)
    rows, metrics = (path / "metrics.jsonl").read_text(), path / "metrics.jsonl"
    metrics.unlink()
    assert status(page()).startswith("stopped before the first evaluation; continue it with: ")
    lock = RunLock(path / LOCK)
    assert status(page()) == "starting: the model is loaded and the base model evaluated first"
    assert "steps = 50" in page()
    metrics.write_text(rows)
    assert re.fullmatch(r"running, step 0 of 50 \(last result at \d\d:\d\d:\d\d\)", status(page()))
    assert "The base model's accuracy is 50.0 % on 2 held-out problems." in words(page())
    with metrics.open("a") as file:
        file.write(json.dumps({"step": 20, "wall_time": 120.0, "reward/mean": 0.5}) + "\n" + '{"step": 21, "cut sh')
    assert re.fullmatch(r"running, step 20 of 50, 3 min left \(last result at .*\)", status(page()))
    assert "Latest" in words(page())
    lock.close()
    assert re.fullmatch(r"stopped after step 20 of 50, .*; continue it with: .* resume .*run", status(page()))
    (path / LOCK).write_text(json.dumps({"pid": 2**31, "host": socket.gethostname()}))  # it was killed
    assert status(page()).startswith("stopped after step 20 of 50")
    shutil.rmtree(path)
    write_run(path, {0: "10", 4: "11"})
    assert re.fullmatch(r"ended after step 4, \d{4}-\d\d-\d\d \d\d:\d\d", status(page()))
    assert "Final" in words(page())


def test_what_cannot_be_read_is_said_and_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "IDLE", 0)
    path = write_run(tmp_path / "run", {0: "10", 4: "11"})
    page = LivePage(path)
    whole = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text("nonsense\n")
    assert (
        status(page())
        == f"cannot be shown now: {path}/metrics.jsonl:1: is damaged. Delete the line, or restore the file."
    )
    (path / "metrics.jsonl").write_text(whole)
    assert status(page()).startswith("ended after step 4")


def test_a_place_that_cannot_become_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "no" / "run", tmp_path / "file"):
        with pytest.raises(RunDirError, match="not a run directory"):
            LivePage(path)


def test_a_page_is_made_only_of_news_and_leaves_the_processor_to_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made, now = write_run(tmp_path / "run", {0: "10"}), [], [0.0]
    monkeypatch.setattr(live, "live_page", lambda _: made.append(1) or f"page {len(made)}")
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(live.time, "thread_time", lambda: float(len(made)))  # a page takes a second
    page = LivePage(path)
    assert [page(), page()] == ["page 1"] * 2
    for second, expected in ((9, "page 1"), (10, "page 2"), (30, "page 2")):
        now[0] = second
        if second < 30:
            (path / "completions.jsonl").write_text(f"{second}")
        assert page() == expected


def test_the_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    path = write_run(tmp_path / "run", {0: "10", 4: "11"})
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    problems = make_config().problems_per_step
    for row in rows[1:]:
        row |= {"prompts/tied": problems // 4, "reward/accuracy": 0.125 * row["step"], "completions/truncated": 0.5}
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = live_page(path)
    assert page.count("data:image/svg+xml;base64,") == 4  # curves and signal, light and dark
    assert "Answers in training are those of members, which are perturbed" in words(page)
    assert "4 0.400 25.0 % 50.0 % 50.0 % 60.0 3 0.300 25.0 % 37.5 %" in words(page)
    assert "In step 4: 25.0 % tied, accuracy 50.0 %." in page


def test_no_text_of_a_run_acts_and_the_policy_names_our_script_alone(tmp_path: Path) -> None:
    problems = [{"id": HOSTILE, HOSTILE: HOSTILE}, {"id": "b"}]
    path = write_run(
        tmp_path / HOSTILE.replace("/", ""),
        {0: "00", 4: "10"},
        config=make_config(task_options={"note": HOSTILE}),
        problems=problems,
        answer=lambda *_: HOSTILE,
    )
    for page in (live_page(path), live_page(tmp_path / f"{HOSTILE.replace('/', '')} none")):
        (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
        assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in POLICY
        assert {char for char in page if not char.isprintable()} == {"\n"}
        tags = Tags(page)
        assert not {"iframe", "object", "embed", "link", "base", "form", "a"} & {tag for tag, *_ in tags.found}
        assert {value for tag, name, value in tags.found if name in ("src", "srcset")} <= {"data:,"}
        assert [name for _, name, _ in tags.found if name.startswith("on")] == []
    assert words(live_page(path)).count(inert(HOSTILE)) > 3
    assert "unsafe" not in POLICY.replace("style-src 'unsafe-inline'", "")


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_a_browser_renews_the_page_and_leaves_what_the_reader_has_opened(tmp_path: Path) -> None:
    """The second page has another status, a new section in front and closed details; the third adds nothing."""
    first, second = (
        render("Live", f"{n}", live.part("status", f"status {n}"), body, script=live._SCRIPT)
        for n, body in (
            (1, [live.part("details", "more", "inside"), live.part("paragraph", "one")]),
            (2, [live.part("details", "more", "inside"), live.part("paragraph", "two"), live.part("paragraph", "<i>")]),
        )
    )
    asked: list[Any] = []

    def page() -> str:
        asked.append(1)
        return first.replace("<details>", "<details open>") if len(asked) == 1 else second

    dom, messages = browse(page, tmp_path)
    assert len(asked) > 2
    assert messages == []
    assert "<title>2</title>" in dom
    assert "status 2" in dom
    assert '<details open="">' in dom
    assert re.search(r"<p>two</p>\s*<p>&lt;i&gt;</p>", dom)
    assert "<p>one</p>" not in dom


def browse(page: Callable[[], str], folder: Path) -> tuple[str, list[str]]:
    """Return the page as it is after some seconds of a browser's own time, and what the browser complained of."""
    with LocalPage(page, POLICY) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
        command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=7000", "--dump-dom", server.url]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        server.shutdown()
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line and "favicon" not in line]


def test_the_command_ends_quietly_by_ctrl_c(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {0: "10"})
    words = [sys.executable, "-m", "eggroll_llm", "watch", str(path)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": listen}
    with subprocess.Popen(words, text=True, **options) as process:
        assert process.stdout
        line = process.stdout.readline()
        url = re.fullmatch(rf"{path}: (http://127\.0\.0\.1:\d+/) \(on this machine only; Ctrl-C ends it\)\n", line)
        assert url
        with urllib.request.urlopen(url[1], timeout=60) as answer:
            assert status(answer.read().decode()).startswith("ended after step 0")
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0
