import subprocess
import sys
from pathlib import Path

import pytest

from eggroll_llm.system import torch_companions
from eggroll_llm.system.torch_companions import find_broken, main


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on the path of this process and of its children, with one sound and one broken package."""
    for name, source in {
        "sound": "",
        "broken": "raise RuntimeError('operator broken::nms does not exist')",
    }.items():
        (tmp_path / f"{name}.py").write_text(source)
        metadata = tmp_path / f"{name}-0.28.0.dist-info/METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.28.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_only_what_is_installed_and_cannot_be_imported_is_broken(site: Path) -> None:
    (found,) = find_broken(("sound", "absent", "broken"))
    assert (found.name, found.version) == ("broken", "0.28.0")
    assert found.error == "RuntimeError: operator broken::nms does not exist"


def test_listing_removes_nothing(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch_companions, "find_broken", lambda: find_broken(("broken",)))
    monkeypatch.setattr(torch_companions, "remove", lambda broken: pytest.fail("removed"))
    assert main([]) == 1
    assert capsys.readouterr().out.startswith("broken 0.28.0 cannot be imported with this torch: RuntimeError")


def test_removing_says_so_once(site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    removed: list[str] = []
    monkeypatch.setattr(torch_companions, "find_broken", lambda: find_broken(("sound", "broken")))
    monkeypatch.setattr(torch_companions, "remove", lambda broken: removed.append(broken.name))
    assert main(["--remove-broken"]) == 0
    assert removed == ["broken"]
    # What is done on purpose is no error, and does not read like one.
    assert capsys.readouterr().out == "removed broken 0.28.0: built for another torch, and not needed for text models\n"


def test_removal_uninstalls_from_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command))
    torch_companions.remove(torch_companions.Broken(name="torchvision", version="0.28.0", error="x"))
    assert commands == [[sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"]]


def test_nothing_broken_is_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch_companions, "find_broken", list)
    assert main(["--remove-broken"]) == 0
    assert capsys.readouterr().out == ""
