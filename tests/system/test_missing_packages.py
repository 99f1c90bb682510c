"""Where a package is missing a command is one line that says what to install: in real environments without it."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from bare import ROOT, Bare, with_dependencies
from made_up_runs import write_run

RECIPE = ROOT / "recipes" / "countdown_smollm2.toml"
SWEEP = ROOT / "recipes" / "sweeps" / "compare_two_numbers.toml"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Bare:
    """What `pip install .` leaves: no torch, no vLLM."""
    return Bare(tmp_path_factory.mktemp("bare") / "env", with_dependencies(["eggroll-llm"]))


def refusal(bare: Bare, folder: Path, *words: object, **environment: str) -> str:
    result = bare.run(*words, cwd=folder, **environment)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    return result.stderr.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (("train", RECIPE), "torch and vllm"),
        (("train", RECIPE, "--dry-run"), "torch and vllm"),
        (("resume", "run"), "torch and vllm"),
        (("eval", "smollm2-135m-instruct", "--task", "countdown"), "torch and vllm"),
        (("sweep", SWEEP), "torch and vllm"),
        (("sweep", SWEEP, "--dry-run"), "torch and vllm"),
        (("bench", RECIPE), "torch and vllm"),
        (("replay", "run", "--out", "model"), "torch"),
    ],
)
def test_without_torch_a_command_says_what_installs_it(
    bare: Bare, tmp_path: Path, words: tuple[object, ...], missing: str
) -> None:
    said, _, command = refusal(bare, tmp_path, *words).partition(" Run: ")
    assert said == f"{words[0]} needs {missing}, not installed here."
    assert shlex.split(command) == ["make", "-C", str(ROOT), "install", f"VENV={bare.folder}"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["load_recipe('{recipe}')", "train(None, 'run')", "evaluate('run')"])
def test_without_torch_a_function_says_what_installs_it(bare: Bare, tmp_path: Path, call: str) -> None:
    function = call.partition("(")[0]
    code = (
        f"import eggroll_llm, eggroll_llm.errors as errors\n"
        f"try: eggroll_llm.{call.format(recipe=RECIPE)}\n"
        f"except errors.InstallError as error: print(error)"
    )
    said = bare.python_code(code, cwd=tmp_path)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.startswith(f"{function} needs torch and vllm, not installed here. Run: make -C ")
    assert list(tmp_path.iterdir()) == []


def test_what_needs_no_engine_works_without(bare: Bare, tmp_path: Path) -> None:
    for words in (["--version"], ["--help"], ["train", "--settings"]):
        assert bare.run(*words, cwd=tmp_path).returncode == 0
    run = write_run(tmp_path / "run", {0: "00000000", 4: "11110000"})
    compared = bare.run("compare", run, "--out", tmp_path / "comparison", cwd=tmp_path)
    assert (compared.returncode, compared.stderr) == (0, "")
    found = bare.run("doctor", cwd=tmp_path)
    assert found.returncode == 1
    assert f"→ torch: Run: make -C {ROOT} install VENV={bare.folder}\n" in found.stdout
    assert found.stdout.endswith("Fix this before training: torch, vllm.\n")


@pytest.fixture
def without(bare: Bare) -> Iterator[Bare]:
    """The environment, whose packages are put back afterwards."""
    before = {path.name: path.readlink() for path in bare.site.iterdir() if path.is_symlink()}
    yield bare
    for name, target in before.items():
        if not (bare.site / name).is_symlink():
            (bare.site / name).symlink_to(target)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("rich", ("doctor",)),
        ("matplotlib", ("compare", "run")),
        ("numpy", ("compare", "run")),
        ("huggingface_hub", ("push", "run", "me/mine", "--dry-run")),
    ],
)
def test_without_one_of_our_own_dependencies(
    without: Bare, tmp_path: Path, module: str, words: tuple[object, ...]
) -> None:
    write_run(tmp_path / "run", {0: "00000000", 4: "11110000"})
    without.remove(module)
    said, _, command = refusal(without, tmp_path, *words).partition(" Run: ")
    assert said in (f"{module} is not installed here.", f"{words[0]} needs {module}, not installed here.")
    assert shlex.split(command)[:4] == [str(without.python), "-m", "pip", "install"]
    assert shlex.split(command)[4].startswith(module.replace("_", "-"))
