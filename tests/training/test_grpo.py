"""Runs of GRPO: that they differ from those of ES in nothing but the method, and that resuming changes nothing.

With the stand-in engine, but for the last part, which is the real one on tiny models.
"""

import dataclasses
import importlib.util
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from documented import undocumented
from grpo_stub import Bench, Recorder, StubEngine, final, rows, same_run, write_recipe
from next_token import next_token_logprobs
from safetensors.torch import load_file
from torch import Tensor

from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.engine.interface import Completion, Decoding, Request
from eggroll_llm.errors import EngineError, InstallError, ModelError, TaskError, TrainingError
from eggroll_llm.models.push import plan_push
from eggroll_llm.records.checkpoint import verify_checkpoint
from eggroll_llm.records.run_dir import RunDir, is_run_dir
from eggroll_llm.records.weights import weights_at
from eggroll_llm.system import signals
from eggroll_llm.system.invocation import command
from eggroll_llm.tasks import prompts
from eggroll_llm.tasks.task import Problem
from eggroll_llm.training import es as trainer
from eggroll_llm.training import grpo, session
from eggroll_llm.training.grpo_trl.rollouts import checkpoint_tensors
from eggroll_llm.training.harness import Harness
from eggroll_llm.training.prepare import prepare
from eggroll_llm.training.scorer import Scoring


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, tiny_model("llama"), monkeypatch)


def steps_of(engine: StubEngine, per_step: int) -> list[list[tuple[int, ...]]]:
    """The prompts of each step, each once, in the order in which they were asked."""
    asked = [requests for requests, decoding in engine.asked if 0 < decoding.temperature < 1]  # 1 is the reference
    prompts = [list(dict.fromkeys(request.prompt_ids for request in requests)) for requests in asked]
    assert all(len(step) == per_step for step in prompts)
    return prompts


def test_both_methods_see_the_same(bench: Bench) -> None:
    """Problems, their order, prompts in tokens, seeds, decoding, held-out problems, length of the run."""
    bench.train("es", method="es")
    es = bench.engine
    bench.train("grpo")
    ours = bench.engine
    assert steps_of(es, 3) == steps_of(ours, 3)
    assert len(steps_of(ours, 3)) == 4
    assert len({tuple(step) for step in map(tuple, steps_of(ours, 3))}) > 1
    asked = [(requests, how) for requests, how in es.asked if how.temperature != 1]  # but for the reference
    for (theirs, how), (mine, mine_how) in zip(asked, ours.asked, strict=True):
        assert dataclasses.replace(mine_how, logprobs=False) == how
        # A member answers once; GRPO's first answer to a problem has the same seed.
        seeds = {request.prompt_ids: request.seed for request in reversed(theirs)}
        assert seeds == {request.prompt_ids: request.seed for request in reversed(mine)}
    one, other = bench.folder / "es", bench.folder / "grpo"
    steps = [[row["step"] for row in rows(path) if "eval/accuracy" in row] for path in (one, other)]
    assert steps == [[0, 2, 4]] * 2
    for step in steps[0]:
        files = [(path / "evaluations" / f"step-{step:06d}.jsonl").read_text() for path in (one, other)]
        assert files[0] == files[1]  # the stand-in answers the same whatever it has learned


def test_the_same_completion_gets_the_same_reward(bench: Bench) -> None:
    """Both through `Scorer`, on the text of the engine: each problem's first answers are the same in both runs."""
    bench.train("es", method="es", log__completions=100)
    bench.train("grpo", log__completions=100)
    graded = [
        {
            (row["step"], row["problem"], row["completion"]): (row["reward"], row["correct"], row["detail"])
            for row in rows(bench.folder / name, "completions.jsonl")
        }
        for name in ("es", "grpo")
    ]
    assert len(graded[0]) == 12
    assert graded[0].items() <= graded[1].items()
    assert len(rows(bench.folder / "grpo", "completions.jsonl")) == 48


@pytest.mark.parametrize("method", ["es", "grpo"])
def test_graders_hear_of_a_thought_that_the_prompt_opened(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """In training and evaluation, of each problem whose prompt does."""
    opened = set("acegikmoqsuwyA")
    monkeypatch.setattr(prompts, "ends_in_thought", lambda text: text[-1] in opened)
    judged: list[tuple[Completion, Problem]] = []
    put = Scoring.put

    def recording(self: Scoring, number: int, completion: Completion, problem: Problem) -> None:
        judged.append((completion, problem))
        put(self, number, completion, problem)

    monkeypatch.setattr(Scoring, "put", recording)
    bench.train("run", method=method, steps=1)
    assert {(voted["id"].split("-")[0], completion.thought_open) for completion, voted in judged} == {
        (split, thought) for split in ("train", "test") for thought in (False, True)
    }
    assert all(completion.thought_open == (problem["letter"] in opened) for completion, problem in judged)


def test_a_group_is_of_one_problem_and_its_answers_have_different_seeds(bench: Bench) -> None:
    bench.train("run", steps=1)
    ((requests, decoding),) = [asked for asked in bench.engine.asked if asked[1].temperature]
    assert decoding == Decoding(max_tokens=12, temperature=0.8, logprobs=True)
    assert len(requests) == 12
    assert len({request.seed for request in requests}) == 12
    for group in range(0, 12, 4):
        assert len({request.prompt_ids for request in requests[group : group + 4]}) == 1


@pytest.mark.parametrize("limits", [{"steps": 0, "minutes": 1.4}, {"steps": 2, "minutes": 9.0}], ids=str)
def test_both_methods_end_by_the_same_rule(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any]
) -> None:
    """30 seconds a step; evaluations, which take 1000, do not count."""
    clock = [0.0]
    for module in (trainer, grpo):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def pass_time(decoding: Decoding) -> None:
        clock[0] += 30 if decoding.temperature else 1000

    bench.prepare_engine = lambda engine: setattr(engine, "on_generate", pass_time)
    outcomes = [bench.train(method, method=method, eval__every=1, **limits) for method in ("es", "grpo")]
    ended = [(o.steps, o.wall_time, [row["wall_time"] for row in o.metrics]) for o in outcomes]
    assert ended[0] == ended[1]
    assert ended[0][:2] == ((3, 90.0) if limits["minutes"] < 2 else (2, 60.0))
    again = bench.train("grpo", "resume", eval__every=1, **limits | {"minutes": 9.0, "steps": 4})
    assert (again.steps, again.wall_time) == (4, 120.0)


def test_rows_have_the_names_of_es(bench: Bench) -> None:
    bench.train("es", method="es")
    outcome = bench.train("grpo")
    names = [{key for row in rows(bench.folder / name) for key in row} for name in ("es", "grpo")]
    of_es = {"fitness/std", "members/dropped", "time/noise", "sigma", "twins/differ", "base/divergence"}
    assert names[0] - names[1] - {"twins/unread"} == of_es
    assert undocumented(names[1]) == set()
    assert names[1] - names[0] >= {"loss", "grad_norm", "entropy", "completions/dropped", "clip_ratio/region_mean"}
    row = outcome.metrics[1]
    completions = [
        c for (_, d), a in zip(bench.engine.asked, bench.engine.answers, strict=True) if d.logprobs for c in a
    ]
    assert row["completions"] == 12
    assert row["tokens/generated"] == sum(len(c.token_ids) for c in completions[:12])
    assert row["completions/truncated"] == sum(c.truncated for c in completions[:12]) / 12
    assert row["throughput/generated_per_second"] == pytest.approx(row["tokens/generated"] / row["time/sample"])
    parts = [row[f"time/{part}"] for part in ("sample", "reward", "update", "serve")]
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(row["time/step"])
    assert row["wall_time"] == row["time/step"]
    # Engine and trainer agree, so nothing is corrected; kl is only there with a weight.
    assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert "kl" not in row


@pytest.mark.parametrize("flags", [{}, {"grpo__num_iterations": 2}, {"grpo__lora_rank": 2}], ids=str)
def test_two_halves_are_the_whole(bench: Bench, flags: dict[str, Any]) -> None:
    """2 steps, resumed to 4, from transformers' own state: weights, optimizer, schedule, problems, seeds, shuffling."""
    flags |= {"checkpoint__every": 2}
    bench.train("whole", **flags)
    bench.train("halves", **flags, steps=2)
    outcome = bench.train("halves", "resume", **flags)
    same_run(bench.folder / "whole", bench.folder / "halves")
    assert (outcome.steps, outcome.first["step"], outcome.last["step"]) == (4, 0, 4)
    assert "resuming from the checkpoint of step 2; later steps are repeated" in bench.display.messages
    walls = [row["wall_time"] for row in outcome.metrics]
    assert walls == sorted(walls)
    base = load_file(bench.model / "model.safetensors")
    assert max((final(bench.folder / "whole")[name] - base[name]).abs().max() for name in base) > 0.01


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Path:
    """A run that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        bench = Bench(tmp_path_factory.mktemp("whole"), tiny_model("llama"), patch)
        return bench.train("run", checkpoint__every=0, checkpoint__best="false", eval__every=1).path


@pytest.mark.parametrize(
    ("place", "every"),
    [
        *((place, every) for place in ("append_completions", "append_metrics", "generate") for every in (0, 2)),
        ("save", 1),
        ("step", 2),  # of the optimizer
    ],
)
def test_a_run_killed_anywhere_ends_like_one_that_was_not(bench: Bench, whole: Path, place: str, every: int) -> None:
    """At its third step. Without a checkpoint everything is done again."""
    flags = {"checkpoint__every": every, "checkpoint__best": "false", "eval__every": 1}
    bench.folder, name = whole.parent, f"killed-{place}-{every}"  # an evaluation names the file of its task
    owner: Any = {"save": Harness, "generate": StubEngine, "step": torch.optim.AdamW}.get(place, RunDir)
    real, calls = getattr(owner, place), [0]

    def fail(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == {"append_metrics": 4, "generate": 6}.get(place, 3):
            raise Killed
        return real(*arguments, **options)

    with bench.monkeypatch.context() as patch:
        patch.setattr(owner, place, fail)
        with pytest.raises(Killed):
            bench.train(name, **flags)
    assert bench.engine.closed
    assert not (bench.folder / name / "final").exists()
    bench.train(name, "resume", **flags)
    same_run(whole, bench.folder / name)


def test_a_gpu_without_memory_for_the_passes_ends_the_run_with_what_to_change(bench: Bench) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with bench.monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", fail)
        with pytest.raises(
            TrainingError,
            match=r"^step 1: the GPU has too little .*2\.00 GiB.*grpo\.gradient_checkpointing",
        ):
            bench.train("run")
    assert bench.engine.closed
    assert bench.train("run", "resume").steps == 4


def test_a_signal_that_was_swallowed_while_sampling_ends_the_run(bench: Bench) -> None:
    def swallow(decoding: Decoding) -> None:
        if decoding.logprobs:
            bench.monkeypatch.setattr(signals, "_number", 15)

    bench.prepare_engine = lambda engine: setattr(engine, "on_generate", swallow)
    with pytest.raises(signals.Interrupted) as info:
        bench.train("run")
    assert info.value.status == 143
    assert (len(bench.engine.asked), bench.engine.loads, bench.engine.closed) == (2, 1, True)


@pytest.mark.parametrize("flags", [{"every": 2}, {"every": 0}, {"every": 0, "best": "false"}])
def test_a_finished_run_resumed_keeps_its_weights(bench: Bench, flags: dict[str, Any]) -> None:
    changes = {f"checkpoint__{key}": value for key, value in flags.items()}
    bench.train("run", steps=2, **changes)
    before = final(bench.folder / "run")
    metrics = (bench.folder / "run" / "metrics.jsonl").read_text()
    shutil.rmtree(bench.folder / "run" / "final")
    bench.train("run", "resume", steps=2, **changes)
    assert (bench.folder / "run" / "metrics.jsonl").read_text() == metrics
    assert all(torch.equal(tensor, before[name]) for name, tensor in final(bench.folder / "run").items())


def test_what_a_run_leaves_behind(bench: Bench, tiny_model: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    outcome = bench.train("run", eval__every=1, checkpoint__every=3)
    path = bench.folder / "run"
    run = RunDir.open(path)
    assert is_run_dir(path)
    best = max(outcome.metrics, key=lambda row: row.get("eval/accuracy", -1))["step"]
    assert {3, best, 4} - {0} == {int(entry.name[5:]) for entry in run.checkpoints.iterdir()}
    checkpoint = verify_checkpoint(run.checkpoints / "step-000003")
    assert (checkpoint.metadata["wall_time"], checkpoint.step) == (outcome.metrics[3]["wall_time"], 3)
    assert [entry.name for entry in (checkpoint.path / "trainer").iterdir()] == ["checkpoint-3"]
    assert not list(checkpoint.path.rglob("training_args.bin"))  # a pickle that nothing reads
    assert weights_at(run, "final") == (run.final, 4)
    for directory, step in ((checkpoint.path, 3), (run.checkpoints / "step-000004", 4)):
        assert weights_at(run, str(step)) == (directory, step)
        model = AutoModelForCausalLM.from_pretrained(directory)
        assert str(model.dtype) == "torch.float32"
        assert AutoTokenizer.from_pretrained(directory).encode("4+5=9")
        card = (directory / "README.md").read_text()
        assert f"- Updates: {step}.\n" in card
        assert "fine-tuned with GRPO by TRL" in card
        assert "replay" not in card
    # What is served is what is written, tied head included.
    served = bench.engine.model.state_dict()
    assert all(torch.equal(tensor, served[name]) for name, tensor in final(path).items())
    assert (
        load_file(checkpoint.path / "model.safetensors").keys() == load_file(bench.model / "model.safetensors").keys()
    )
    assert run.journal.read_text().count("\n") == 1
    with pytest.raises(ModelError, match="step 1 has no checkpoint, and the run has no journal"):
        weights_at(run, "1")


def test_a_run_is_pushed_without_a_journal_and_not_replayed(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    from eggroll_llm.cli.main import main

    bench.train("run", steps=1, checkpoint__every=1)
    plan = plan_push(bench.folder / "run", "me/model")
    assert [file.path for file in plan.files if "/" in file.path] == ["eggroll/config.toml"]
    assert [text for text in plan.warnings if "is a path of this machine" not in text] == []
    assert "trainer" in plan_push(bench.folder / "run", "me/model", at="1").left_out
    assert main(["replay", str(bench.folder / "run"), "--out", str(bench.folder / "out")]) == 2
    assert 'trained with method "grpo", and only the updates of "es" are in a journal' in capsys.readouterr().err
    assert not (bench.folder / "out").exists()


def test_rewards_that_are_not_finite_are_left_out_and_counted(bench: Bench) -> None:
    """Those completions have no advantage, and their group's mean is that of the others."""
    outcome = bench.train("run", steps=1, reward="math.nan if len(values) % 3 == 0 else reward")
    row = outcome.metrics[1]
    assert 0 < row["completions/dropped"] <= 6
    assert row["reward/mean"] == row["reward/mean"]
    assert row["grad_norm"] > 0
    outcome = bench.train("more", steps=1, reward="math.inf if len(values) % 3 == 0 else reward")
    assert outcome.metrics[1]["completions/dropped"] == row["completions/dropped"]
    assert outcome.metrics[1]["loss"] == row["loss"]
    outcome = bench.train("tied", steps=1, reward="math.nan if len(values) % 3 == 0 else 0.25")
    assert (outcome.metrics[1]["prompts/tied"], outcome.metrics[1]["loss"]) == (3, 0)
    with pytest.raises(TaskError, match=r"step 1: \d+ of 12 completions were dropped for a NaN or infinite reward"):
        bench.train("all", steps=1, reward="math.nan")


def test_a_grader_that_always_fails_stops_the_run_with_its_traceback(bench: Bench) -> None:
    with pytest.raises(TaskError, match=r"failed on all 12 completions of the first step(?s:.)*ZeroDivisionError"):
        bench.train("run", reward="1 / 0", steps=1)


def test_a_score_that_exits_costs_its_own_completions(bench: Bench) -> None:
    bench.processes = True
    outcome = bench.train("exits", steps=1, reward="__import__('os')._exit(1) if len(values) % 5 == 0 else reward")
    assert 0 < outcome.metrics[1]["rewards/failed"] < 12
    bench.train("raises", steps=1, reward="1 / 0 if len(values) % 5 == 0 else reward")
    same_run(bench.folder / "exits", bench.folder / "raises")
    failed = [row for row in rows(bench.folder / "exits", "completions.jsonl") if row["detail"] == "reward_failed"]
    assert failed
    (said, _) = [text for text in bench.display.messages if "score() failed, so" in text]
    assert "score() ended its process with status 1; problem " in said


def test_tied_rewards_change_nothing_and_say_so_after_three_steps(bench: Bench) -> None:
    outcome = bench.train("run", reward="0.25", checkpoint__every=0)
    base = load_file(bench.model / "model.safetensors")
    assert all(torch.equal(tensor, base[name].float()) for name, tensor in final(bench.folder / "run").items())
    for row in outcome.metrics[1:]:
        assert (row["prompts/tied"], row["reward/mean"], row["grad_norm"]) == (3, 0.25, 0)
    assert bench.display.notes == ["rewards tied, nothing learned"] * 4
    said = [text for text in bench.display.messages if "nothing was learned in all 3 steps, because all ans" in text]
    assert len(said) == 1
    assert "raise sampling.samples_per_prompt (now 4), sampling.prompts_per_step (now 3) or" in said[0]
    assert outcome.findings[0].severity == "failure"


def test_a_tied_step_is_logged_and_said_although_the_moments_move_the_weights(bench: Bench) -> None:
    """As in TRL. The rewards differ in the first evaluation, of 4 problems, and in the first step of 12 completions."""
    counted = "self.__dict__.update(n=self.__dict__.get('n', 0) + 1) or (reward if self.n <= 16 else 0.25)"
    outcome = bench.train("run", reward=counted, steps=2, eval__every=0, checkpoint__every=1)
    assert bench.display.notes == ["", "rewards tied, nothing learned"]
    first, tied = outcome.metrics[1:]
    assert (first["prompts/tied"], tied["prompts/tied"]) == (0, 3)
    assert first["grad_norm"] > tied["grad_norm"] == 0
    after = [load_file(bench.folder / "run" / "checkpoints" / f"step-00000{n}" / "model.safetensors") for n in (1, 2)]
    assert any(not torch.equal(tensor, after[1][name]) for name, tensor in after[0].items())


@pytest.mark.parametrize(
    ("learning_rate", "message"),
    [
        (1e30, r"step 2: (loss|grad_norm) is nan, so the weights are lost.* grpo\.learning_rate"),
        (1e38, r"step 1: \d+ tensors are not finite any more, first .* grpo\.learning_rate"),
    ],
)
def test_a_run_whose_weights_are_lost_stops(bench: Bench, learning_rate: float, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        bench.train("run", grpo__learning_rate=learning_rate, grpo__max_grad_norm=0)


@pytest.mark.parametrize(
    ("step", "kept"),
    [(2, "There is no checkpoint yet, so the run starts over"), (4, "The checkpoint of step 3 is")],
)
def test_when_the_engine_fails_the_run_goes_on_from_the_newest_checkpoint(bench: Bench, step: int, kept: str) -> None:
    def prepare(engine: StubEngine) -> None:
        sampled = 0

        def fail(decoding: Decoding) -> None:
            nonlocal sampled
            sampled += decoding.temperature > 0
            if sampled == step:
                raise EngineError("the inference engine failed in sampling: RuntimeError")

        engine.on_generate = fail

    flags = {"checkpoint__best": "false"}
    bench.prepare_engine = prepare
    with pytest.raises(TrainingError) as info:
        bench.train("run", **flags)
    run = bench.folder / "run"
    assert str(info.value).startswith(f"step {step}: the inference engine failed in sampling: RuntimeError. {kept}")
    assert str(info.value).endswith(f"resume with: {command('resume', run)}")
    assert bench.engine.closed
    bench.prepare_engine = lambda engine: None
    bench.train("run", "resume", **flags)
    bench.train("whole", **flags)
    same_run(run, bench.folder / "whole")


def test_lost_weights_are_not_served_and_the_last_checkpoint_goes_on(bench: Bench) -> None:
    """Lost in the optimizer step of step 3, as in a fault that loss and gradient do not show."""
    from eggroll_llm.training.grpo_trl.rollouts import Rollouts

    flags = {"checkpoint__every": 1, "checkpoint__best": "false"}
    bench.train("whole", **flags)
    real = Rollouts.sync_weights

    def lose(self: Rollouts) -> None:
        if self.step == 3:
            with torch.no_grad():
                next(self.model.parameters())[0, 0] = math.inf
        real(self)

    with bench.monkeypatch.context() as patch:
        patch.setattr(Rollouts, "sync_weights", lose)
        with pytest.raises(TrainingError, match=r"step 3: \d+ tensors are not finite any more, first .*embed_tokens"):
            bench.train("lost", **flags)
    assert all(tensor.isfinite().all() for tensor in bench.engine.model.state_dict().values())
    run = RunDir.open(bench.folder / "lost")
    assert [row["step"] for row in run.read_metrics()] == [0, 1, 2]
    assert sorted(path.name for path in run.checkpoints.iterdir())[-1] == "step-000002"
    bench.train("lost", "resume", **flags)
    same_run(bench.folder / "whole", bench.folder / "lost")


def test_without_trl_one_line_says_what_to_install(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from eggroll_llm.cli.main import main

    find = importlib.util.find_spec
    gone = {"trl"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    recipe = write_recipe(bench.folder, bench.model)
    with pytest.raises(InstallError):
        prepare(load_recipe(recipe), bench.folder)
    assert main(["train", str(recipe), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: method = "grpo" needs trl, not installed here. Run: ')
    assert " -m pip install 'trl" in error  # with its versions, so quoted
    gone |= {"peft"}
    with pytest.raises(InstallError, match="needs trl and peft, not installed"):
        prepare(load_recipe(recipe, [("grpo.lora_rank", "2")]), bench.folder)
    prepare(load_recipe(recipe, [("method", "es"), ("sampling.samples_per_prompt", "1")]), bench.folder)


@dataclasses.dataclass
class Comparison:
    """Largest differences found after each step, between logits of the engine and of the model in training."""

    trainer: Any = None
    before: Any = None
    found: list[float] = dataclasses.field(default_factory=list)
    moved: list[float] = dataclasses.field(default_factory=list)


PROMPTS = tuple(tuple((7 * i + j) % 300 + 3 for j in range(40)) for i in range(3))


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Comparison:
    from transformers import AutoModelForCausalLM

    comparison = Comparison()
    real_init, real_end = grpo.GrpoTrainer.__init__, Harness.end_step

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        real_init(self, *arguments, **options)
        comparison.trainer = self
        comparison.before = logits(self)

    def logits(of: Any) -> Tensor:
        return next_token_logprobs(of.engine, [Request(prompt_ids=prompt) for prompt in PROMPTS])

    def end(self: Harness, *arguments: Any, **options: Any) -> Any:
        ours = logits(comparison.trainer)
        model = AutoModelForCausalLM.from_pretrained(comparison.trainer.model_dir, dtype=torch.float32)
        tensors = checkpoint_tensors(comparison.trainer.trl.model)
        model.load_state_dict({name: t.to(self.run.engine.dtype).float() for name, t in tensors.items()})
        with torch.no_grad():
            theirs = model(torch.tensor(PROMPTS)).logits[:, -1].log_softmax(-1)
        comparison.found.append(float((ours - theirs).abs().max()))
        comparison.moved.append(float((ours - comparison.before).abs().max()))
        return real_end(self, *arguments, **options)

    monkeypatch.setattr(grpo.GrpoTrainer, "__init__", init)
    monkeypatch.setattr(Harness, "end_step", end)
    return comparison


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("kind", "dtype", "flags"),
    [
        ("llama", "float32", {}),
        ("qwen3", "float32", {"grpo.lora_rank": "4", "grpo.learning_rate": "0.1"}),
        ("qwen2", "bfloat16", {"grpo.dtype": "bfloat16"}),
    ],
)
def test_the_engine_serves_the_model_in_training(
    tmp_path: Path,
    tiny_model: Callable[[str], Path],
    compared: Comparison,
    kind: str,
    dtype: str,
    flags: dict[str, str],
) -> None:
    """After each of four steps, logits of the engine are those of transformers with the trainer's weights, rounded."""
    recipe = write_recipe(tmp_path, tiny_model(kind), stop="e")
    config = load_recipe(recipe, [("engine.dtype", dtype), ("engine.max_model_len", "64"), *flags.items()])
    outcome = session.train(config, tmp_path, tmp_path / "run", "fail", Recorder())
    tolerance = 1e-4 if dtype == "float32" else 0.2
    assert len(compared.found) == 4
    assert max(compared.found) < tolerance
    assert min(compared.moved) > 5 * tolerance
    assert len(set(compared.moved)) == 4
    for row in outcome.metrics[1:]:
        # Sampled with the weights that the trainer has: the probabilities are the same, but for rounding.
        exact = dtype == "float32"
        difference = row["sampling/sampling_logp_difference/max"]
        assert difference < (1e-4 if exact else 0.5)
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4 if exact else 0.3)


@pytest.mark.vllm
def test_two_halves_are_the_whole_with_the_real_engine(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    """Sampled by vLLM, with other settings of the engine in the second half; bit-equal in float32."""
    recipe = write_recipe(tmp_path, tiny_model("llama"), stop="e")
    runs: list[tuple[str, str, Any, str]] = [
        ("whole", "4", "fail", "16"),
        ("halves", "2", "fail", "16"),
        ("halves", "4", "resume", "8"),
    ]
    for name, steps, on_existing, sequences in runs:
        flags = [("steps", steps), ("checkpoint.every", "2"), ("engine.max_sequences", sequences)]
        session.train(load_recipe(recipe, flags), tmp_path, tmp_path / name, on_existing, Recorder())
    same_run(tmp_path / "whole", tmp_path / "halves")


@pytest.mark.vllm
@pytest.mark.slow
def test_it_learns_what_trl_learns_with_its_own_rollouts(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    """To write low characters: our engine's rollouts, and TRL as it comes, whose model samples for itself."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    steps, rate = 40, 3e-3
    recipe = write_recipe(tmp_path, tiny_model("llama"), reward='sum(c < "A" for c in completion) / 12')
    flags = {
        "steps": str(steps),
        "grpo.learning_rate": str(rate),
        "grpo.micro_batch": "12",
        "sampling.samples_per_prompt": "8",
        "checkpoint.every": "0",
        "eval.every": "0",
    }
    config = load_recipe(recipe, list(flags.items()))
    outcome = session.train(config, tmp_path, tmp_path / "run", "fail", Recorder())
    ours = [row["reward/mean"] for row in outcome.metrics[1:]]

    prepared = prepare(config, tmp_path)
    theirs: list[float] = []

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        rewards = [sum(c < "A" for c in completion) / 12 for completion in completions]
        theirs.append(sum(rewards) / len(rewards))
        return rewards

    GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32),
        reward_funcs=[reward],
        args=GRPOConfig(
            output_dir=str(tmp_path / "trl"),
            use_cpu=True,
            bf16=False,
            max_steps=steps,
            per_device_train_batch_size=12,
            gradient_accumulation_steps=2,
            num_generations=8,
            max_completion_length=12,
            temperature=0.8,
            learning_rate=rate,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": [prepared.task.prompt(p) for p in prepared.train.problems]}),
        processing_class=AutoTokenizer.from_pretrained(config.model),
    ).train()
    assert len(ours) == len(theirs) == steps
    for rewards in (ours, theirs):
        assert sum(rewards[:3]) / 3 < 0.45
        assert sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 0.3
