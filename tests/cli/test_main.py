"""A user's mistake is one line that says what to do, and status 2; help and dry runs start nothing."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eggroll_llm.cli.evaluate import _samples_file
from eggroll_llm.cli.main import main
from eggroll_llm.config.compare import flat
from eggroll_llm.config.help import field_help
from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.errors import TaskError
from eggroll_llm.es.sizes import Law, Measured
from eggroll_llm.models.embedded import DESCRIPTION
from eggroll_llm.records.baseline import Constant, Share
from eggroll_llm.records.diagnosis import Finding
from eggroll_llm.records.run_dir import RunDir
from eggroll_llm.system import invocation
from eggroll_llm.training import session
from eggroll_llm.training.session import Outcome
from eggroll_llm.tuning.tune import Tuned

ROOT = Path(__file__).parents[2]
RECIPE = """\
model = "{model}"
task = "words.py:Words"
steps = 3

[es]
population = 4
sigma = 0.01
learning_rate = 0.01

[sampling]
prompts_per_step = 2
max_tokens = 20
"""
TASK = """
class Words:
    def problems(self, split):
        return [{"word": f"{split} {n}"} for n in range(5)]
    def prompt(self, problem):
        return f"Reverse {problem['word']}:"
    def score(self, completion, problem):
        return float(completion == problem["word"][::-1])
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(session, "start_engine", lambda *_, **__: pytest.fail("the engine was started"))
    (tmp_path / "words.py").write_text(TASK)
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(model=tiny_model("llama")))
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line on standard error of a command that must end with status 2."""

    def message(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("error: ")
        assert "Traceback" not in error
        return error.removeprefix("error: ").rstrip("\n")

    return message


@pytest.mark.parametrize(("policy", "expected"), [(None, "10000"), ("passive", None)])
def test_threads_do_not_wait_awake_for_long(
    policy: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("GOMP_SPINCOUNT", ""), ("OMP_WAIT_POLICY", policy or "")):
        monkeypatch.setenv(name, value)  # so that what is set here is taken back
        if not value:
            monkeypatch.delenv(name)
    assert main(["nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_no_such_recipe(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    assert re.match(rf"{re.escape(str(path))}\b.*(No such file|no such file|does not exist)", refused("train", path))


def test_a_syntax_error_is_named_with_its_line(refused: Callable[..., str], recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("steps = 3", "steps = = 3"))
    message = refused("train", recipe)
    assert message.startswith(f"{recipe}:3")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("sigma = 0.01", "sigmaa = 0.01", ":7: unknown key es.sigmaa. Did you mean es.sigma?"),
        ("steps = 3", "sigma = 3", ":3: unknown key sigma. Did you mean es.sigma?"),
        ("[sampling]", "[sampling_]", "unknown key sampling_. Did you mean sampling?"),
        ("steps = 3", "steps = 1e3", ":3: steps = 1000.0 is a number, but an integer is expected. Write steps = 1000."),
        ("sigma = 0.01", 'antithetic = "yes"', ':7: es.antithetic = "yes" is a string, but true or false is expected.'),
        (
            "[es]",
            "[log]\nwandb = true\n[es]",
            ":6: log.wandb = true is a boolean, but a string in quotes is expected. Wr",
        ),
        ("[es]", "lr = 0.1\n[es]", ":5: unknown key lr. Did you mean es.learning_rate or grpo.learning_rate?"),
        ("steps = 3", 'steps = "3"', ':3: steps = "3" is a string, but an integer is expected. Remove the quotes: 3.'),
        (
            "population = 4",
            "population = 5",
            ":6: es.population = 5, es.antithetic = true: pairs need an even population",
        ),
        ("sigma = 0.01", "sigma = -1.0", ":7: es.sigma = -1.0: must be above 0"),
        ("[es]", "es = 1\n[log]", "es = 1 is an integer, but es is a table. Write a table [es]"),
    ],
)
def test_mistakes_in_a_recipe(refused: Callable[..., str], recipe: Path, old: str, new: str, said: str) -> None:
    recipe.write_text(recipe.read_text().replace(old, new))
    message = refused("train", recipe)
    assert message.startswith(str(recipe))
    assert said in message


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--es.sigmaa 1", "unknown flag --es.sigmaa. Did you mean --es.sigma?"),
        ("--bogus 1", "unknown flag --bogus. Valid: --model, --task, --method"),
        ("--es.sigma big", "--es.sigma big: a number is expected."),
        ("--steps 1.5", "--steps 1.5: an integer is expected."),
        ("--es.antithetic maybe", "--es.antithetic maybe: true or false is expected."),
        (
            "--log.wandb true",
            "--log.wandb true: a name is expected, not yes or no. Write --log.wandb NAME, or leave it",
        ),
        ("--es.sigma=-1", "--es.sigma: es.sigma = -1.0: must be above 0"),
        ("--es.learning-rate -1e-3", "--es.learning-rate: es.learning_rate = -0.001: must be above 0"),
        ("--es.population 5", "--es.population: es.population = 5, es.antithetic = true: pairs need an even"),
        ("--es.fitness sign --es.antithetic no", '--es.fitness: es.fitness = "sign", es.antithetic = false: the sign'),
        (
            "--sampling.samples_per_prompt 2",
            "--sampling.samples_per_prompt: sampling.samples_per_prompt = 2, sampling.t",
        ),
        (
            "--engine.max_model_len 8",
            "--engine.max_model_len: engine.max_model_len = 8, sampling.max_tokens = 20: leaves",
        ),
        ("--es.sigma", "--es.sigma has no value; write --es.sigma VALUE"),
        ("--es.sigma --seed 3", "--es.sigma has no value; write --es.sigma VALUE"),
        ("--es.antithetic", "--es.antithetic has no value; write --es.antithetic true or false"),
        ("stray", "'stray' is neither a flag nor the value of one; settings are --KEY VALUE"),
        ("es.sigma=0.1", "'es.sigma=0.1' is neither a flag nor the value of one. Write --es.sigma 0.1."),
        ("--dry-run true", "'true' is not expected here: flags such as --dry-run take no value, leave it out"),
        ("--dryrun", "unknown flag --dryrun. Did you mean --dry-run?"),
        ("--dry_run", "unknown flag --dry_run. Did you mean --dry-run?"),
        ("--dry", "unknown flag --dry. Did you mean --dry-run?"),
        ("--chat.template_args.enable_thinking no", "--chat.template_args.enable_thinking: "),
        ("--pop 4", "unknown flag --pop. Did you mean --es.population?"),
        ("--samplin.max_tok 4", "unknown flag --samplin.max_tok. Did you mean --sampling.max_tokens?"),
        ("--lr 0.1", "unknown flag --lr. Did you mean --es.learning_rate or --grpo.learning_rate?"),
        (
            "--learning_rate 0.1",
            "unknown flag --learning_rate. Did you mean --es.learning_rate or --grpo.learning_rate?",
        ),
        ("-lr 0.1", "unknown flag -lr. Did you mean --es.learning_rate or --grpo.learning_rate?"),
        ("--train.max-steps 3", "unknown flag --train.max-steps. Did you mean --steps?"),
        (
            "--batch_size=3",
            "unknown flag --batch_size. Did you mean --sampling.prompts_per_step or --reward.batch_size?",
        ),
        (
            "--num_generations",
            "unknown flag --num_generations. Did you mean --sampling.samples_per_prompt or --es.popula",
        ),
        ("--pop_size 8", "unknown flag --pop_size. Did you mean --es.population?"),
        ("--epochs 8", "unknown flag --epochs. Did you mean --steps?"),
        ("--output_dir 8", "unknown flag --output_dir. Did you mean --run-dir?"),
    ],
)
def test_mistakes_in_flags(refused: Callable[..., str], recipe: Path, flags: str, said: str) -> None:
    assert refused("train", recipe, *flags.split()).startswith(said)


def test_flags_may_stand_before_the_recipe(refused: Callable[..., str], recipe: Path) -> None:
    assert refused("train", "--seed", "3", "--es.sigma=-1", recipe).startswith("--es.sigma: es.sigma = -1.0")


def test_a_setting_of_the_file_that_a_flag_contradicts_is_blamed_on_the_flag(
    refused: Callable[..., str], recipe: Path
) -> None:
    recipe.write_text(recipe.read_text().replace("population = 4", "population = 5\nantithetic = false"))
    assert refused("train", recipe, "--es.antithetic", "yes").startswith("--es.antithetic: es.population = 5")


def test_what_a_method_lacks_is_blamed_on_the_flag_that_chose_it(refused: Callable[..., str], recipe: Path) -> None:
    grpo = ["--method", "grpo"]
    assert refused("train", recipe, *grpo).startswith("--method: grpo.learning_rate = 0.0: must be above 0 with method")
    grpo += ["--grpo.learning_rate", "1e-6"]
    assert refused("train", recipe, *grpo).startswith("--method: sampling.samples_per_prompt = 1: GRPO compares")


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        ("--steps 1e3", "steps", 1000),
        ("--chat.template_args.enable_thinking false", "chat.template_args.enable_thinking", False),
        ("--chat.template-args.depth=2", "chat.template_args.depth", 2),
        ("--steps 20.0", "steps", 20),
        ("--es.antithetic False", "es.antithetic", False),
        ("--es.antithetic off", "es.antithetic", False),
        ("--es.antithetic YES", "es.antithetic", True),
        ("--engine.enforce-eager 0", "engine.enforce_eager", False),
        ("--es.optimizer Adam", "es.optimizer", "adam"),
        ("--es.sigma 1E-3", "es.sigma", 0.001),
        ("--task_options.x True", "task_options.x", True),
    ],
)
def test_flags_are_read_more_generously_than_recipes(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, flags: str, key: str, value: object
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(session, "train", lambda config, _, run_path, *__: seen.append(config) or finished(run_path))
    assert main(["train", *flags.split(), str(recipe)]) == 0
    found = flat(seen[0])[key]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("old", "new", "flags", "said"),
    [
        ("words.py:Words", "countdown", [], ":15: unknown key task_options.coun. Did you mean task_options.count?"),
        ("coun = 3", "count = [3, 2]", ["--task", "countdown"], ":15: Countdown: count = [3, 2] is not a range. Write"),
        (
            "coun = 3",
            "count = 3",
            ["--task", "countdown"],
            ":15: task_options.count = 3 is an integer, but an array is",
        ),
        ("", "", [], ":15: {folder}/words.py: Words does not accept task_options {{'coun': 3}}: got an unexpected"),
        ("coun = 3", 'seed = "', ["--task", "countdown"], ":15: TOML syntax error: "),
        ("coun = 3", "seed = [1,", ["--task", "countdown"], ":15: TOML syntax error: "),
    ],
)
def test_mistakes_in_task_options_have_a_line(
    refused: Callable[..., str], recipe: Path, old: str, new: str, flags: list[str], said: str
) -> None:
    recipe.write_text(f"{recipe.read_text()}\n[task_options]\ncoun = 3\n".replace(old, new))
    assert refused("train", recipe, *flags).startswith(f"{recipe}{said.format(folder=recipe.parent)}")


def test_mistakes_in_task_options_that_are_flags(refused: Callable[..., str], recipe: Path) -> None:
    flags = ["--task", "countdown", "--task_options.count", "[3, 2]"]
    assert refused("train", recipe, *flags).startswith("--task_options.count: Countdown: count = [3, 2] is not a range")
    model = load_recipe(recipe).model
    message = refused("eval", model, "--task", "countdown", "--task_options.sede", "1")
    assert message == "--task_options.sede: unknown key task_options.sede. Did you mean task_options.seed?"
    assert "unknown flag" not in refused("eval", model, "--task", "countdown", "--chat.system", "x")
    message = refused("eval", model, "--task", "countdown", "--task_options.foo", "1")
    assert message.startswith("--task_options.foo: unknown key task_options.foo. Valid keys: task_options.count, ")


def test_an_error_that_quotes_an_answer_does_nothing_to_the_terminal(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user's grader that fails on its gold answer, and has it in its message; its traceback keeps its lines."""
    hostile = "    def gold(self, problem):\n        return '\\x1b[2J\\x9b31m\\u202e five'\n"
    task = TASK.replace("return float(", "raise ValueError(completion + '\\ud800')\n        return float(") + hostile
    (recipe.parent / "words.py").write_text(task)
    capsys.readouterr()
    assert main(["train", str(recipe)]) == 2
    error = capsys.readouterr().err
    lines = error.removesuffix("\n").split("\n")
    assert lines[0].startswith("error: Problem 'train-1' (train): score() failed on its gold answer")
    assert "    raise ValueError(completion + '\\ud800')" in lines
    assert lines[-1] == "ValueError: \\x1b[2J\\x9b31m\\u202e five\\ud800"
    assert all(line.isprintable() for line in lines)


def test_a_missing_model(refused: Callable[..., str], recipe: Path, tmp_path: Path) -> None:
    message = refused("train", recipe, "--model", "no/such/model", "--run-dir", tmp_path / "run")
    assert message.startswith("model 'no/such/model' is neither an existing directory, nor a GGUF file, nor a hub id")
    assert message.endswith("correct `model`")
    assert not (tmp_path / "run").exists()


def test_an_existing_run_directory(refused: Callable[..., str], recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunDir.create(path, "steps = 1\n") as run:
        run.journal.write_text("kept\n")
    message = refused("train", recipe, "--run-dir", path)
    assert message.startswith(f"{path}: already holds a run. Choose another --run-dir")
    assert message.endswith(f"continue it with: {invocation.command('resume', path)}")
    assert (path / "journal.jsonl").read_text() == "kept\n"
    assert "is neither empty nor a run directory" in refused("train", recipe, "--run-dir", tmp_path)
    missing = tmp_path / "no" / "run"
    assert f"the folder {missing.parent} does not exist" in refused("train", recipe, "--run-dir", missing)


def test_a_run_directory_that_cannot_be_used(refused: Callable[..., str], recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, said in (
        (tmp_path / "file", f"{tmp_path}/file: is a file"),
        (tmp_path / "file" / "run", f"{tmp_path}/file/run: {tmp_path}/file is not a folder"),
        (tmp_path / "no" / "run", f"the folder {tmp_path}/no does not exist"),
        (tmp_path / "a" / ".." / "run", 'contains "..". Write the directory out'),
        ("a\0b", r"run directory 'a\x00b': not a path"),
        (".", f"run directory '.': has no name. Write its path out: {os.getcwd()}"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        assert said in refused("train", recipe, "--run-dir", path), path
    assert {path.name for path in tmp_path.iterdir()} == {"file", "recipe.toml", "words.py"}


def test_a_run_directory_in_use(refused: Callable[..., str], recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    code = (
        "import sys; from eggroll_llm.records.run_dir import RunDir; run = RunDir.create(sys.argv[1], 'x = 1'); "
        "print('locked', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        for mode in ("fail", "resume", "overwrite"):
            assert refused("train", recipe, "--run-dir", path, "--on-existing", mode) == (
                f"{path}: in use by process {holder.pid} on {socket.gethostname()}. Wait for it, stop it, or choose "
                "another --run-dir."
            )
        holder.kill()


def test_a_prompt_that_does_not_fit(refused: Callable[..., str], recipe: Path) -> None:
    message = refused("train", recipe, "--sampling.max_tokens", "510")
    assert "the model's context of 512 tokens allows 512: lower sampling.max_tokens" in message


def test_eval_of_a_model_needs_a_task(refused: Callable[..., str], recipe: Path, tmp_path: Path) -> None:
    model = load_recipe(recipe).model
    tasks = "gsm8k, countdown, dataset, verifiers or file.py:NAME"
    assert refused("eval", model) == f"{model}: which task? Add --recipe RECIPE.toml, or --task {tasks}"
    assert "neither an existing directory" in refused("eval", "nothing", "--task", "countdown")
    assert 'task = "gsm9k" is not known' in refused("eval", model, "--task", "gsm9k")
    assert "unknown flag --es.sigma" in refused("eval", model, "--task", "countdown", "--es.sigma", "1")
    out = tmp_path / "no" / "result.json"
    message = refused("eval", model, "--task", "countdown", "--out", out)
    assert message == f"--out {out}: the folder {out.parent} does not exist: create it"
    for folder in (tmp_path, "", "."):
        assert "is a folder: name a file in it" in refused("eval", model, "--task", "countdown", "--out", folder)
    assert "File name too long" in refused("eval", model, "--task", "countdown", "--out", tmp_path / ("b" * 256))


def test_where_the_answers_of_an_evaluation_go(tmp_path: Path) -> None:
    for name, answers in (
        ("a.json", "a.samples.jsonl"),
        ("b.greedy", "b.greedy.samples.jsonl"),
        ("c", "c.samples.jsonl"),
    ):
        assert _samples_file(tmp_path / name) == tmp_path / answers


def test_a_task_on_the_command_line_is_where_the_user_stands(
    refused: Callable[..., str], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for command in (["train", recipe], ["eval", load_recipe(recipe).model]):
        assert refused(*command, "--task", "my.py:TASK").startswith(f"{tmp_path}/here/my.py: there is no such file")


def test_replay_refuses_what_is_no_run_and_an_existing_directory(refused: Callable[..., str], tmp_path: Path) -> None:
    assert f"{tmp_path}: not a run directory" in refused("replay", tmp_path, "--out", tmp_path / "model")
    with RunDir.create(tmp_path / "run", "") as run:
        run.journal.write_text("")
    message = refused("replay", tmp_path / "run", "--out", tmp_path)
    assert message == f"--out {tmp_path}: exists already: name a new directory"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "'trian' is not a command. Did you mean train?"),
        (["evaluate", "m"], "'evaluate' is not a command. Did you mean eval?"),
        (["frobnicate"], "'frobnicate' is not a command. Commands: init, train, resume, eval,"),
        (["my.toml", "--seed", "3"], f"Did you mean: {invocation.command('train', 'my.toml', '--seed', '3')}"),
        (["--verison"], "unknown flag --verison. Did you mean --version?"),
        (["train"], "the following arguments are required: RECIPE.toml"),
        (["train", "r.toml", "--on-existing", "ask"], "argument --on-existing: invalid choice: 'ask'"),
        (["eval", "m", "--limit", "0"], "argument --limit: 0: must be at least 1"),
        (["eval", "m", "--limit", "few"], "argument --limit: few: not a whole number"),
        (["replay", "run"], "the following arguments are required: --out"),
        (["replay", "run", "--out", "x", "--step", "-1"], "argument --step: -1: must not be negative"),
        (["replay", "run", "--out", "x", "--es.sigma", "1"], "unknown flag --es.sigma. Valid: --step, --out."),
        (
            ["replay", "run", "more", "--out", "x"],
            "'more' is neither a flag nor the value of one; this command takes no",
        ),
        (["push", "run", "a/b", "--dryrun"], "unknown flag --dryrun. Did you mean --dry-run?"),
        (["eval", "m", "--max_new_tokens", "3"], "unknown flag --max_new_tokens. Did you mean --max-tokens?"),
        (["eval", "m", "--output", "3"], "unknown flag --output. Did you mean --out?"),
        (["doctor", "--fix"], "unknown flag --fix. This command has no flags."),
    ],
)
def test_mistakes_in_the_words_of_a_command(refused: Callable[..., str], arguments: list[str], said: str) -> None:
    assert said in refused(*arguments)


def test_every_setting_is_listed_without_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(["train", "--settings"])
    assert info.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    flags = [line.partition(" ")[0] for line in lines[::2]]
    assert flags == [f"--{row.key}" for row in field_help(RunConfig)]
    assert "--es.population (integer, default 32)" in lines
    assert (
        lines[lines.index("--es.population (integer, default 32)") + 1].strip().startswith("Models evaluated per step")
    )


def test_a_dry_run_prints_settings_and_budget_and_trains_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert main(["train", str(recipe), "--dry-run", "--es.rank", "2", "--engine.dtype", "float32"]) == 0
    output = capsys.readouterr().out
    printed = tomllib.loads(output)
    assert (printed["es"]["rank"], printed["engine"]["slots"], printed["engine"]["dtype"]) == (2, 4, "float32")
    assert printed["task"] == f"{tmp_path}/words.py:Words"
    assert printed["engine"]["max_model_len"] % 32 == 0
    assert "# per step: 8 completions = 4 members x 2 prompts x 1 samples\n" in output
    assert "# in all: 3 steps, 24 completions\n" in output
    assert "# time, estimated: " in output
    assert "grpo" not in printed
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == before


def test_a_dry_run_says_what_does_not_fit_the_machine(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--dry-run", "--engine.slots", "1000000000"]) == 2
    output = capsys.readouterr()
    assert "GiB for slots\n" in output.out
    assert output.err.startswith("error: the run needs ")
    assert "lower engine.slots from 1e+09 to " in output.err


def test_a_dry_run_shows_the_notes_of_the_task(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"nums": [n, 7], "target": n + 7, "solution": f"{n}*7" if n == 2 else f"{n}+7"} for n in range(2, 42)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = ["--task_options.file", str(tmp_path / "rows.json"), "--task_options.test_size", "8"]
    options += ["--task_options.prompt_style", "tinyzero"]
    assert main(["train", str(recipe), "--task", "countdown", *options, "--dry-run"]) == 0
    assert "# Countdown: the solution of 1 of 40 rows is wrong and left out" in capsys.readouterr().out


def test_paths_in_flags_are_relative_to_where_the_user_stands(
    refused: Callable[..., str], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    message = refused("train", recipe, "--task", "gsm8k", "--task_options.data_dir", "data")
    assert message.startswith(f"{tmp_path}/here/data/train.jsonl: there is no such file")
    recipe.write_text(recipe.read_text() + '[task_options]\ndata_dir = "data"\n')
    message = refused("train", recipe, "--task", "gsm8k")
    assert message.startswith(f"{tmp_path}/data/train.jsonl: there is no such file")


def finished(run_path: Path) -> Outcome:
    metrics: list[dict[str, Any]] = [
        {"step": 0, "wall_time": 0.0, "eval/accuracy": 0.25, "eval/problems": 256},
        {
            "step": 1, "wall_time": 90.0, "eval/accuracy": 0.5, "eval/problems": 256,
            "tokens/prompt": 3000, "tokens/generated": 2000, "time/sample": 4.0, "time/noise": 0.1, "time/update": 0.2,
            "time/serve": 0.1, "time/step": 10.0,
        },
    ]  # fmt: skip
    return Outcome(
        steps=1,
        wall_time=90.0,
        first=metrics[0],
        last=metrics[1],
        metrics=metrics,
        base_model=DESCRIPTION,
        constant=Constant(pattern="a - b, largest first", accuracy=0.518, problems=512),
        kinds={"[/carry]": (Share(accuracy=0.0, problems=4), Share(accuracy=0.5, problems=4))},
        final=run_path / "final",
    )


def test_a_run_ends_with_its_table_and_how_to_go_on(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def train(config: RunConfig, recipe_dir: Path, run_path: Path, on_existing: str, display: Any) -> Outcome:
        seen.append((config.seed, recipe_dir, run_path, on_existing))
        return finished(run_path)

    monkeypatch.setattr(session, "train", train)
    monkeypatch.setenv("COLUMNS", "120")
    path = tmp_path / "run"
    assert main(["train", str(recipe), "--run-dir", str(path), "--on-existing", "resume", "--seed=5"]) == 0
    assert seen == [(5, tmp_path, path, "resume")]
    output = capsys.readouterr().out
    # 0.5 - 0.25, 5000 tokens in 4 s, 0.4 s of 10.
    for text in (
        "25.0 % [20.1, 30.6]",
        "50.0 % [43.9, 56.1]",
        "+25.0 points",
        "p < 0.0001",
        "1,250",
        "4.0%",
        "1 updates in 1.5 minutes",
    ):
        assert text in output
    words = " ".join(re.sub("[│┃]", " ", output).split())
    assert "the best constant answer: a - b, largest first 51.8 % [47.5, 56.1]" in words
    assert "[/carry] (4) 0.0 % [0.0, 49.0] 50.0 % [15.0, 85.0] +50.0 points" in words
    assert f"before: the base model, {DESCRIPTION}" in words
    lines = output.splitlines()
    assert f"model: {path / 'final'} (loads in transformers and vLLM)" in lines
    assert f"continue: {invocation.command('resume', path, '--steps', '6')}" in lines
    assert f"test: {invocation.command('eval', path)}" in lines


def test_the_command_that_continues_a_run_goes_beyond_where_it_is(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after `resume RUN --steps N` with fewer steps than the run has."""
    path = tmp_path / "run"
    monkeypatch.setattr(session, "train", lambda *_: dataclasses.replace(finished(path), steps=40))
    assert main(["train", str(recipe), "--run-dir", str(path)]) == 0
    output = capsys.readouterr().out
    assert f"continue: {invocation.command('resume', path, '--steps', '80')}\n" in output
    assert "after step 1" in output
    assert "final/ was not evaluated" in output


def test_the_last_lines_of_a_run_that_failed_do_not_look_like_success(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = Finding(kind="worse", severity="failure", text="the model got worse", remedy="lower the rate")
    found = dataclasses.replace(finished(tmp_path / "run"), findings=[finding])
    monkeypatch.setattr(session, "train", lambda *_: found)
    assert main(["train", str(recipe), "--run-dir", str(tmp_path / "run")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "failure: the model got worse: lower the rate"


def test_the_default_run_directory_is_named_after_recipe_and_time(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: list[Path] = []

    def train(config: RunConfig, recipe_dir: Path, run_path: Path, on_existing: str, display: Any) -> Outcome:
        paths.append(run_path)
        return finished(run_path)

    monkeypatch.setattr(session, "train", train)
    assert main(["train", str(recipe)]) == 0
    assert re.fullmatch(r"runs/recipe-\d{8}-\d{6}", str(paths[0]))


def test_interrupted(recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a signal, as by code of the user's; with one: test_signals.py."""

    def train(*_: Any) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "train", train)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["train", str(recipe)]) == 130
    assert capsys.readouterr().err == "interrupted\n"  # before there was a run
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("method", ["es", "grpo"])
def test_an_interruption_says_what_a_resumed_run_begins_with(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The journal of ES has every update; GRPO has its checkpoints."""

    def train(config: RunConfig, recipe_dir: Path, run_path: Path, *_: Any) -> Outcome:
        run_path.mkdir()
        for name in ("config.toml", "journal.jsonl"):
            (run_path / name).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "train", train)
    run = tmp_path / "run"
    words = ["--method", method, "--grpo.learning_rate", "1e-6", "--sampling.samples_per_prompt", "8"]
    words += ["--sampling.temperature", "1"]
    assert main(["train", str(recipe), "--run-dir", str(run), *(words if method == "grpo" else [])]) == 130
    lost = "there is no checkpoint yet, so the run starts over; " if method == "grpo" else ""
    assert capsys.readouterr().err == f"interrupted; {lost}resume with: {invocation.command('resume', run)}\n"


def test_text_of_a_model_in_an_error_is_inert(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as in the traceback of a grader, whose lines stay lines."""

    def train(*_: Any) -> Outcome:
        raise TaskError("score() failed:\n  ValueError: \x1b[2J\u202e\r!")

    monkeypatch.setattr(session, "train", train)
    assert main(["train", str(recipe)]) == 2
    assert capsys.readouterr().err == "error: score() failed:\n  ValueError: \\x1b[2J\\u202e\\r!\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_error_that_nobody_reads(unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = command(
        "train", "no.toml", stdout=writing, stderr=writing, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}
    )
    os.close(writing)
    assert result.returncode == 2


def test_a_fault_of_ours_keeps_its_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any) -> Outcome:
        raise RuntimeError("the engine left 1 of 8 requests unanswered")

    monkeypatch.setattr(session, "train", train)
    with pytest.raises(RuntimeError, match="unanswered"):
        main(["train", str(recipe)])


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eggroll_llm", *arguments], cwd=ROOT, text=True, check=False, **options
    )


def test_a_mistake_at_a_real_prompt() -> None:
    """Through the shell: status 2, one line, standard output empty."""
    result = command("train", "no.toml", capture_output=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_a_recipe_is_read_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys; from eggroll_llm.cli.main import main; "
        "print(main(['train', 'no.toml']), sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "2 []\n"


def test_a_reader_that_goes_away() -> None:
    """As in `eggroll-llm train --settings | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    result = command(
        "train", "--settings", stdout=writing, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_tune_prints_settings_that_paste(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    """Of a recipe that has neither of them; what is printed makes a recipe, and flags, with the same values."""
    recipe.write_text(recipe.read_text().replace("sigma = 0.01\n", "").replace("learning_rate = 0.01\n", ""))
    assert "es.sigma" in refused("train", recipe, "--dry-run")
    assert refused("tune", recipe, "--steps", 0, "--minutes", 3).startswith("steps = 0: ")

    def tuned(config: RunConfig, recipe_dir: Path, working: Callable[[str], None]) -> Tuned:
        assert (config.steps, recipe_dir) == (7, recipe.parent)
        measured = (Measured(sigma=0.001, divergence=0.01), Measured(sigma=0.002, divergence=0.03))
        law = Law.through(*measured)
        return Tuned(sigma=0.00123, learning_rate=4.56e-5, law=law, measured=measured, answers=3, tokens=60)

    monkeypatch.setattr("eggroll_llm.tuning.tune.tune", tuned)
    capsys.readouterr()
    assert main(["tune", str(recipe), "--steps", "7"]) == 0
    table, _, pasted = capsys.readouterr().out.partition("[es]\n")
    assert "3 answers of theirs, 60 tokens" in table
    lines, flags = pasted.strip().split("\n\n")
    assert tomllib.loads(lines) == {"sigma": 0.0012, "learning_rate": 4.6e-5}
    words = flags.split()
    es = load_recipe(recipe, list(zip(words[::2], words[1::2], strict=True))).es
    assert (es.sigma, es.learning_rate) == (0.0012, 4.6e-5)
