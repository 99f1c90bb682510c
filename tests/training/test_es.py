"""The loop around the mathematics: what is written when, what stops a run, and that resuming changes nothing."""

import dataclasses
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from documented import undocumented
from fake_engine import (
    CONFIG,
    MEMBERS,
    PROMPTS,
    SHAPES,
    Bench,
    Constant,
    FakeEngine,
    Near,
    NotFinite,
    rows,
    same_run,
)
from safetensors.torch import load_file

from eggroll_llm.config.schema import CheckpointConfig, EvalConfig, LogConfig, RewardConfig, SamplingConfig
from eggroll_llm.engine.interface import Completion, Decoding, Request, UpdateTimes
from eggroll_llm.errors import EngineError, TaskError, TrainingError
from eggroll_llm.es.estimate import NonFiniteUpdate, UpdateSpec
from eggroll_llm.records.answers import TASK, read_samples
from eggroll_llm.records.baseline import Constant as BestConstant
from eggroll_llm.records.checkpoint import verify_checkpoint
from eggroll_llm.records.journal import Journal, read_journal
from eggroll_llm.records.run_dir import RunDir
from eggroll_llm.system.invocation import command
from eggroll_llm.tasks.load import load_task
from eggroll_llm.tasks.task import Answer, Score
from eggroll_llm.training import es as trainer
from eggroll_llm.training import recorder, session
from eggroll_llm.training.recorder import twin_metrics
from eggroll_llm.training.scorer import ScoredRollout
from eval.runs import read_runs


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_it_learns(bench: Bench) -> None:
    """Every member's reward is what the update credits it with, or the mean would not rise like this."""
    outcome = bench.train("run", steps=25)
    assert outcome.first["eval/reward"] < -1.5
    assert outcome.last["eval/reward"] > outcome.first["eval/reward"] + 0.7
    assert outcome.last["eval/accuracy"] > outcome.first["eval/accuracy"]


def test_the_journal_is_on_disk_before_the_weights_move(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "CHECKSUM_EVERY", 2)
    bench.train("run", steps=3, checkpoint=CheckpointConfig(every=2))
    assert [entries for entries, _ in bench.engine.seen] == [1, 2, 3]
    checksums = [checksum for _, checksum in bench.engine.seen]
    assert len(set(checksums)) == 3
    # Recorded at the start and now and then.
    entries = read_journal(bench.folder / "run" / "journal.jsonl").entries
    assert [entry.checksum for entry in entries] == [checksums[0], "", checksums[2]]
    assert verify_checkpoint(bench.folder / "run" / "checkpoints" / "step-000002").metadata["checksum"] == checksums[2]


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("checkpoint_every", [0, 2, 3])
def test_two_halves_are_the_whole(bench: Bench, optimizer: Any, checkpoint_every: int) -> None:
    """3 steps, resumed to 6: from the journal alone, from a checkpoint and one more step, from a checkpoint."""
    changes = {
        "es": dataclasses.replace(CONFIG.es, optimizer=optimizer, learning_rate=0.01, noise_reuse=2),
        "eval": EvalConfig(every=3),
        "checkpoint": CheckpointConfig(every=checkpoint_every),
    }
    bench.train("whole", steps=6, **changes)
    whole = {name: tensor.clone() for name, tensor in bench.engine.state().items()}
    bench.train("halves", steps=3, **changes)
    outcome = bench.train("halves", "resume", steps=6, **changes)
    same_run(bench.folder / "whole", bench.folder / "halves")
    state = bench.engine.state()
    assert state.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, state[name]), name
    assert (outcome.steps, outcome.first["step"], outcome.last["step"]) == (6, 0, 6)
    sources = {0: "base model and 3 updates from the journal", 3: "checkpoint of step 3"}.get(
        checkpoint_every, "checkpoint of step 2 and 1 update from the journal"
    )
    assert f"resuming after step 3: {sources}" in bench.display.messages


PROBABILITIES: dict[str, Any] = {
    "es": dataclasses.replace(CONFIG.es, fitness_from="probabilities"),
    "sampling": SamplingConfig(prompts_per_step=PROMPTS, samples_per_prompt=4, temperature=1.0, max_tokens=9),
}


def test_fitness_from_probabilities_learns_from_answers_of_the_weights(bench: Bench) -> None:
    outcome = bench.train("run", steps=25, **PROBABILITIES)
    assert outcome.last["eval/reward"] > outcome.first["eval/reward"] + 0.4
    first = rows(bench.folder / "run")[1]
    assert first["completions"] == PROMPTS * 4
    assert 0 < first["tokens/scored"] <= MEMBERS * PROMPTS * 3 * 3  # of three tokens each, of which three differ
    assert first["members/divergence"] > 0
    assert {row.get("member") for row in rows(bench.folder / "run", "completions.jsonl")} == {None}


def test_fitness_from_probabilities_resumes_and_replays_to_the_same_bits(bench: Bench) -> None:
    changes = PROBABILITIES | {"eval": EvalConfig(every=3), "checkpoint": CheckpointConfig(every=2)}
    bench.train("whole", steps=5, **changes)
    bench.train("halves", steps=3, **changes)
    bench.train("halves", "resume", steps=5, **changes)
    same_run(bench.folder / "whole", bench.folder / "halves")


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_several_steps_learn_from_the_same_answers_also_when_interrupted(bench: Bench, stop: int) -> None:
    changes = PROBABILITIES | {
        "es": dataclasses.replace(PROBABILITIES["es"], answer_reuse=3),
        "eval": EvalConfig(every=0),
    }
    bench.train("whole", steps=8, **changes)
    bench.train("halves", steps=stop, **changes)
    bench.train("halves", "resume", steps=8, **changes)
    journals = [(bench.folder / name / "journal.jsonl").read_text() for name in ("whole", "halves")]
    assert journals[0] == journals[1]
    steps = rows(bench.folder / "whole")[1:]
    assert [row["completions"] for row in steps] == [12, 0, 0, 12, 0, 0, 12, 0]
    assert [row["weights/drift"] > 0 for row in steps] == [False, True, True, False, True, True, False, True]
    assert steps[1]["reward/mean"] == steps[0]["reward/mean"] != steps[3]["reward/mean"]
    assert {row["step"] for row in rows(bench.folder / "whole", "completions.jsonl")} == {1, 4, 7}


def test_weights_that_have_drifted_too_far_answer_anew(bench: Bench) -> None:
    es = dataclasses.replace(PROBABILITIES["es"], answer_reuse=10, max_drift=1e-12)
    bench.train("run", **PROBABILITIES | {"es": es})
    steps = rows(bench.folder / "run")[1:]
    assert [row["completions"] for row in steps] == [12] * 4
    assert [row["weights/drift"] > 0 for row in steps] == [False, True, True, True]  # which is why


def test_answers_that_teach_nothing_are_not_used_again(bench: Bench) -> None:
    es = dataclasses.replace(PROBABILITIES["es"], answer_reuse=3)
    bench.train("run", task=Constant(), **PROBABILITIES | {"es": es})
    assert [row["completions"] for row in rows(bench.folder / "run")[1:]] == [12] * 4


def test_rewards_of_answers_that_are_not_finite_are_counted_and_end_the_run(bench: Bench) -> None:
    class Partly(Near):
        every = 3

        def reward(self, member: int, value: float, problem: Mapping[str, Any]) -> float:
            self.asked = getattr(self, "asked", 0) + 1
            return math.nan if self.asked % self.every == 0 else super().reward(member, value, problem)

    class Mostly(Partly):
        every = 1

    run = bench.train("some", task=Partly(), steps=2, **PROBABILITIES)
    assert [row["completions/dropped"] > 0 for row in run.metrics[1:]] == [True, True]
    with pytest.raises(TaskError, match=r"step 1: 12 of 12 completions were dropped .*; the first: nan for problem"):
        bench.train("most", task=Mostly(), **PROBABILITIES)


def test_answers_that_were_to_be_used_again_and_are_gone_are_missed_aloud(bench: Bench) -> None:
    changes = PROBABILITIES | {"es": dataclasses.replace(PROBABILITIES["es"], answer_reuse=3)}
    bench.train("run", steps=2, **changes)
    (bench.folder / "run" / "drawn.json").write_text("{")
    bench.train("run", "resume", steps=3, **changes)
    (said,) = [text for text in bench.display.messages if "drawn.json: missing, damaged or of a later step" in text]
    assert said.startswith(f"{bench.folder / 'run' / 'drawn.json'}")


def test_members_without_finite_probabilities_end_the_run(bench: Bench) -> None:
    class Overflowing(FakeEngine):
        def score(self, *args: Any, **keywords: Any) -> torch.Tensor:
            return super().score(*args, **keywords) * torch.nan

    bench.make_engine = Overflowing
    with pytest.raises(TrainingError, match=rf"{MEMBERS} of {MEMBERS} members .* log-probability .* lower es\.sigma"):
        bench.train("run", **PROBABILITIES)


def test_fitness_from_probabilities_without_differences_learns_nothing(bench: Bench) -> None:
    bench.train("run", task=Constant(), **PROBABILITIES)
    steps = rows(bench.folder / "run")[1:]
    assert [row["fitness/std"] for row in steps] == [0] * 4
    assert [row["prompts/tied"] for row in steps] == [PROMPTS] * 4
    assert [row["tokens/scored"] for row in steps] == [0] * 4
    assert any("nothing was learned" in message for message in bench.display.messages)


def test_pairs_with_problems_of_their_own_learn_and_resume(bench: Bench) -> None:
    changes: dict[str, Any] = {"es": dataclasses.replace(CONFIG.es, problems="per_pair")}
    changes["sampling"] = SamplingConfig(prompts_per_step=2, max_tokens=9)
    outcome = bench.train("whole", steps=25, log=LogConfig(completions=100), **changes)
    assert outcome.last["eval/reward"] > outcome.first["eval/reward"] + 0.4
    recorded = [row for row in rows(bench.folder / "whole", "completions.jsonl") if row["step"] == 1]
    problems_of = {m: {row["problem"] for row in recorded if row["member"] == m} for m in range(MEMBERS)}
    assert all(len(problems) == 2 for problems in problems_of.values())
    assert all(problems_of[2 * k] == problems_of[2 * k + 1] for k in range(MEMBERS // 2))
    assert len(set.union(*problems_of.values())) == MEMBERS  # two for each of the pairs
    bench.train("halves", steps=13, log=LogConfig(completions=100), **changes)
    bench.train("halves", "resume", steps=25, log=LogConfig(completions=100), **changes)
    journals = [(bench.folder / name / "journal.jsonl").read_text() for name in ("whole", "halves")]
    assert journals[0] == journals[1]


def test_problems_that_teach_nothing_are_passed_over_and_a_resumed_run_knows_them(bench: Bench) -> None:
    class SomeTie(Near):
        def reward(self, member: int, value: float, problem: Mapping[str, Any]) -> float:
            return 0.25 if problem["x"][0] % 2 else super().reward(member, value, problem)

    changes: dict[str, Any] = {"es": dataclasses.replace(CONFIG.es, skip_tied=True), "task": SomeTie()}
    changes["log"] = LogConfig(completions=100)
    bench.train("whole", steps=30, **changes)
    bench.train("halves", steps=16, **changes)
    bench.train("halves", "resume", steps=30, **changes)
    same_run(bench.folder / "whole", bench.folder / "halves")
    steps = rows(bench.folder / "whole")[1:]
    assert sum(row["problems/skipped"] for row in steps[:3]) == 0  # ten problems, three a step
    assert sum(row["problems/skipped"] for row in steps) > 10
    tied = [row["prompts/tied"] for row in steps]
    assert sum(tied[20:]) < sum(tied[:10])


def test_the_answers_of_every_evaluation_are_kept(bench: Bench) -> None:
    bench.train("run", steps=4, eval=EvalConfig(every=2, problems=5, max_tokens=7))
    folder = bench.folder / "run" / "evaluations"
    assert sorted(file.name for file in folder.iterdir()) == [f"step-00000{step}.jsonl" for step in (0, 2, 4)]
    metrics = {row["step"]: row for row in rows(bench.folder / "run") if "eval/accuracy" in row}
    for step in (0, 2, 4):
        settings, samples = read_samples(folder / f"step-00000{step}.jsonl")
        assert (settings["step"], settings["split"], settings["max_tokens"]) == (step, "test", 7)
        assert [(sample.problem, sample.id) for sample in samples] == [(n, f"test-{n}") for n in range(5)]
        assert sum(s.scores[TASK].correct for s in samples) / 5 == metrics[step]["eval/accuracy"]
        assert sum(s.scores[TASK].reward for s in samples) / 5 == pytest.approx(metrics[step]["eval/reward"])


def test_evaluating_disturbs_nothing(bench: Bench) -> None:
    """Evaluated at every step or never in between: the same journal, and the same weights to the bit."""
    bench.train("often", eval=EvalConfig(every=1))
    bench.train("seldom", eval=EvalConfig(every=0))
    journals = [(bench.folder / name / "journal.jsonl").read_text() for name in ("often", "seldom")]
    assert journals[0] == journals[1]
    weights = [load_file(bench.folder / name / "final" / "model.safetensors") for name in ("often", "seldom")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in SHAPES)


ACCURACIES = [0.2, 0.4, 0.6, 0.4, 0.6, 0.0, 0.2]


class Scripted(Near):
    """Accuracy of the evaluation after each step as in ACCURACIES, whatever the model answers."""

    def __init__(self) -> None:
        self.evaluated = 0

    def score(self, answer: Answer) -> Score:
        score = super().score(answer)
        if not answer.text.startswith("-1 "):
            return score
        evaluation, self.evaluated = self.evaluated // 5, self.evaluated + 1
        number = int(str(answer.problem["id"]).removeprefix("test-"))
        return Score(score.reward, number < round(5 * ACCURACIES[evaluation]), "scripted")


@pytest.mark.parametrize(
    ("checkpoint", "kept"),
    [
        (CheckpointConfig(every=0, keep=1), [2]),
        (CheckpointConfig(every=1, keep=2), [2, 5, 6]),
        (CheckpointConfig(every=3, keep=1), [2, 6]),
        (CheckpointConfig(every=3, keep=1, best=False), [6]),
        (CheckpointConfig(every=0, best=False), []),
    ],
)
def test_the_best_checkpoint_is_kept(bench: Bench, checkpoint: CheckpointConfig, kept: list[int]) -> None:
    """Of equal ones the first; the base model, best at first, needs none."""
    bench.train("run", task=Scripted(), steps=6, eval=EvalConfig(every=1), checkpoint=checkpoint)
    found = sorted(path.name for path in (bench.folder / "run" / "checkpoints").iterdir())
    assert found == [f"step-00000{step}" for step in kept]
    for path in found:
        verified = verify_checkpoint(bench.folder / "run" / "checkpoints" / path)
        card = (verified.path / "README.md").read_text()
        assert f"--step {verified.step} --out DIR" in card


class Told(Near):
    """Near, with gold answers and kinds."""

    def gold(self, problem: Mapping[str, Any]) -> str:
        return f"0 {problem['target']}"

    def kind(self, problem: Mapping[str, Any]) -> str:
        return "odd" if problem["x"][0] % 2 else "even"


def test_a_run_records_the_best_constant_answer_and_the_kinds_of_problems(bench: Bench) -> None:
    """Of 2.0, 2.3, ... the first that is nearer than 0.5 to most of 2.0, 2.3, 2.6, 2.9, 3.2, by hand."""
    found = bench.train("run", task=Told(), steps=2)
    constant = BestConstant(pattern="0 2.3", accuracy=0.6, problems=5)
    assert found.constant == constant
    kinds = {kind: [share.problems for share in shares] for kind, shares in found.kinds.items()}
    assert kinds == {"even": [3, 3], "odd": [2, 2]}
    overall = sum(share.accuracy * share.problems for _, share in found.kinds.values()) / 5
    assert overall == pytest.approx(found.last["eval/accuracy"])
    assert (
        "| none: the best constant answer, `0 2.3` | 60.0 % [23.1, 88.2] |" in (found.final / "README.md").read_text()
    )
    (run,) = read_runs([found.path])
    assert run.constant == constant
    plain = bench.train("plain", steps=2)
    assert (plain.constant, plain.kinds) == (None, {})
    assert bench.train("run", "resume", task=Told(), steps=3).constant == constant


def test_killed_before_the_best_checkpoint_was_written(bench: Bench) -> None:
    options: dict[str, Any] = {"steps": 2, "eval": EvalConfig(every=1), "checkpoint": CheckpointConfig(every=0)}

    def fail(*arguments: Any) -> None:
        raise Killed

    with bench.monkeypatch.context() as patch:
        patch.setattr(recorder, "save_checkpoint", fail)
        with pytest.raises(Killed):
            bench.train("run", task=Scripted(), **options)
    assert not list((bench.folder / "run" / "checkpoints").iterdir())
    task = Scripted()
    task.evaluated = 10
    bench.train("run", "resume", task=task, **options)
    found = sorted(path.name for path in (bench.folder / "run" / "checkpoints").iterdir())
    assert found == ["step-000001", "step-000002"]
    assert [row["eval/accuracy"] for row in rows(bench.folder / "run")] == ACCURACIES[:3]


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("place", ["generate", "append", "update", "append_completions", "append_metrics", "save"])
def test_a_run_killed_anywhere_ends_like_one_that_was_not(bench: Bench, place: str, step: int) -> None:
    bench.train("whole", checkpoint=CheckpointConfig(every=1))

    with bench.monkeypatch.context() as patch:
        owner = {
            "generate": FakeEngine,
            "append": Journal,
            "update": FakeEngine,
            "append_completions": RunDir,
            "append_metrics": RunDir,
            "save": trainer.EsTrainer,
        }[place]
        real, calls = getattr(owner, place), [0]

        def fail(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            # An evaluation comes before step 1, and generates and logs as well.
            if calls[0] == step + (place in ("generate", "append_metrics")) + (place == "generate" and step > 2):
                raise Killed
            return real(*arguments, **options)

        patch.setattr(owner, place, fail)
        with pytest.raises(Killed):
            bench.train("killed", checkpoint=CheckpointConfig(every=1))
    assert not (bench.folder / "killed" / "final").exists()
    assert bench.engine.closed
    bench.train("killed", "resume", checkpoint=CheckpointConfig(every=1))
    same_run(bench.folder / "whole", bench.folder / "killed")
    steps = [row["step"] for row in rows(bench.folder / "killed")]
    assert steps == [0, 1, 2, 3, 4]


def test_killed_in_the_first_evaluation(bench: Bench) -> None:
    bench.train("whole")

    def fail(requests: Sequence[Request]) -> None:
        raise Killed

    bench.prepare_engine = lambda engine: setattr(engine, "on_generate", fail)
    with pytest.raises(Killed):
        bench.train("killed")
    bench.prepare_engine = lambda engine: None
    bench.train("killed", "resume")
    same_run(bench.folder / "whole", bench.folder / "killed")


def test_a_damaged_checkpoint_is_passed_over_and_named(bench: Bench) -> None:
    changes = {"checkpoint": CheckpointConfig(every=1)}
    bench.train("whole", steps=4, **changes)
    bench.train("halves", steps=2, **changes)
    damaged = bench.folder / "halves" / "checkpoints" / "step-000002" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    bench.train("halves", "resume", steps=4, **changes)
    assert any(message.startswith(f"{damaged}: ") for message in bench.display.messages)
    assert "resuming after step 2: checkpoint of step 1 and 1 update from the journal" in bench.display.messages
    same_run(bench.folder / "whole", bench.folder / "halves")


def test_tied_rewards_change_nothing_and_say_so_after_three_steps(bench: Bench) -> None:
    outcome = bench.train("run", task=Constant(), steps=5)
    assert len({checksum for _, checksum in bench.engine.seen}) == 1
    for row in outcome.metrics[1:]:
        assert (row["update/rms"], row["update/changed"], row["fitness/std"]) == (0, 0, 0)
        assert (row["prompts/tied"], row["reward/mean"]) == (PROMPTS, 0.25)
    for entry in read_journal(bench.folder / "run" / "journal.jsonl").entries:
        assert entry.fitness == (0.0,) * MEMBERS
    assert bench.display.notes == ["rewards tied, nothing learned"] * 5
    said = [text for text in bench.display.messages if "nothing was learned in all 3 steps, because all mem" in text]
    assert len(said) == 1
    assert "every answer was right: choose harder problems" in said[0]
    assert [f"{finding}"[:45] for finding in outcome.findings] == ["failure: nothing was learned in all 5 steps, "]
    bench.display.messages.clear()
    bench.train("short", task=Constant(), steps=2)
    assert not [text for text in bench.display.messages if "nothing was learned" in text]
    bench.display.notes.clear()
    bench.train("other", steps=2)
    assert bench.display.notes == ["", ""]


class Breaking(Near):
    """Right until the weights have left their place."""

    def score(self, answer: Answer) -> Score:
        score = super().score(answer)
        return Score(score.reward, score.reward > -10, "near")

    def problems(self, split: str) -> list[dict[str, Any]]:
        problems = super().problems(split)
        return [{**problem, "id": f"{problem['id']}{half}"} for half in "ab" for problem in problems]


def test_weights_that_are_destroyed_are_said_to_be(bench: Bench) -> None:
    """While the run goes on, once each, and at its end: it has exit status 0, as its files are whole."""
    outcome = bench.train("run", task=Breaking(), steps=3, es=dataclasses.replace(CONFIG.es, learning_rate=1e5))
    assert (outcome.first["eval/accuracy"], outcome.last["eval/accuracy"]) == (1, 0)
    assert (outcome.last["eval/won"], outcome.last["eval/lost"]) == (0, 10)
    assert [finding.severity for finding in outcome.findings[:2]] == ["failure", "failure"]
    for said in (
        "got worse: from 100.0 % [72.2, 100.0] before training to 0.0 % [0.0, 27.8]",
        "which destroys a model",
    ):
        assert len([text for text in bench.display.messages if said in text]) == 1
        assert any(said in finding.text for finding in outcome.findings)
    assert "**Warning:** the model got worse" in (outcome.final / "README.md").read_text()
    # What is said and recorded is the same for a run in two pieces.
    changes: dict[str, Any] = {"task": Breaking(), "es": dataclasses.replace(CONFIG.es, learning_rate=1e5)}
    bench.train("halves", steps=2, **changes)
    again = bench.train("halves", "resume", steps=3, **changes)
    assert again.findings == outcome.findings


def test_the_prompt_is_kept_for_report_and_card(bench: Bench) -> None:
    outcome = bench.train("run", steps=1)
    run = session.RunDir.open(bench.folder / "run")
    assert run.example_prompt() == "what is near?"
    assert "## Prompt\n" in (outcome.final / "README.md").read_text()
    assert "```text\nwhat is near?\n```" in (outcome.final / "README.md").read_text()


def test_an_update_that_is_too_large_is_refused_before_it_is_recorded(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eggroll_llm.es.estimate.LARGEST_LEARNING_RATE", 1.0)
    with pytest.raises(TrainingError, match=r"update of step 1 not applied: learning_rate is 2, .*lower es\."):
        bench.train("run", es=dataclasses.replace(CONFIG.es, learning_rate=2.0))
    assert not read_journal(bench.folder / "run" / "journal.jsonl").entries
    assert bench.engine.seen == []
    assert bench.engine.closed


def test_a_run_goes_on_after_an_update_was_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.train("whole")
    real, calls = trainer.check_finite, [0]

    def refuse(update: UpdateSpec) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise NonFiniteUpdate("update of step 3 not applied: it is too large")
        real(update)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "check_finite", refuse)
        with pytest.raises(TrainingError, match="update of step 3 not applied: it is too large"):
            bench.train("refused")
    assert len(read_journal(bench.folder / "refused" / "journal.jsonl").entries) == 2
    assert [row["step"] for row in rows(bench.folder / "refused")] == [0, 1, 2]
    assert not (bench.folder / "refused" / "final").exists()
    bench.train("refused", "resume")
    same_run(bench.folder / "whole", bench.folder / "refused")


def test_weights_that_are_not_finite_any_more_stop_the_run_and_are_not_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a memory fault makes them: it cannot happen by an update that was checked."""
    checkpoint = CheckpointConfig(every=1)
    bench.train("whole", checkpoint=checkpoint)
    real = FakeEngine.update

    def spoil(self: FakeEngine, spec: UpdateSpec) -> UpdateTimes:
        times = real(self, spec)
        if len(self.seen) == 2:
            times = dataclasses.replace(times, report=dataclasses.replace(times.report, finite=False))
        return times

    with monkeypatch.context() as patch:
        patch.setattr(FakeEngine, "update", spoil)
        with pytest.raises(TrainingError, match="step 2: weights are no longer finite although the update was"):
            bench.train("lost", checkpoint=checkpoint)
    assert [row["step"] for row in rows(bench.folder / "lost")] == [0, 1]
    assert [path.name for path in (bench.folder / "lost" / "checkpoints").iterdir()] == ["step-000001"]
    bench.train("lost", "resume", checkpoint=checkpoint)
    same_run(bench.folder / "whole", bench.folder / "lost")


def test_members_without_a_finite_reward_are_dropped_and_counted(bench: Bench) -> None:
    outcome = bench.train("run", task=NotFinite(2), steps=1)
    (entry,) = read_journal(bench.folder / "run" / "journal.jsonl").entries
    assert entry.dropped == (2, 3)
    assert entry.fitness[2:4] == (0.0, 0.0)
    assert all(entry.fitness[member] for member in (0, 1, 4, 5, 6, 7))
    row = outcome.metrics[1]
    assert (row["members/dropped"], row["rewards/failed"]) == (2, 0)
    assert math.isfinite(row["reward/mean"])
    assert row["update/rms"] > 0
    recorded = [line for line in rows(bench.folder / "run", "completions.jsonl") if line["reward"] is None]
    assert {line["member"] for line in recorded} == {2}
    (said,) = [text for text in bench.display.messages if "returned NaN or infinity" in text]
    samples = [f'nan for problem {line["problem"]}, answer "{line["completion"]}"' for line in recorded]
    assert said.partition("learned from it: ")[2] in samples


def test_failures_of_one_member_are_counted_said_once_and_recorded(bench: Bench) -> None:
    """The first of each step is in completions.jsonl, though in the first step it would not have been there."""

    class Fails(Near):
        def reward(self, member: int, value: float, problem: Mapping[str, Any]) -> float:
            if member == 5:
                raise KeyError("five")
            return super().reward(member, value, problem)

    def first_rows(name: str, task: Near) -> list[dict[str, Any]]:
        metrics = bench.train(name, task=task, steps=2).metrics
        assert [row["rewards/failed"] for row in metrics[1:]] == [PROMPTS if name == "fails" else 0] * 2
        return [row for row in rows(bench.folder / name, "completions.jsonl") if row["step"] == 1]

    assert [row["member"] for row in first_rows("whole", Near())] == [1, 2, 3, 4]
    assert (bench.display.messages, bench.display.activities) == ([], ["starting the engine", "writing the model"])
    recorded = first_rows("fails", Fails())
    assert [row["member"] for row in recorded] == [1, 2, 3, 5]
    assert (recorded[3]["reward"], recorded[3]["correct"], recorded[3]["detail"]) == (0, False, "reward_failed")
    (said,) = [text for text in bench.display.messages if "score() failed, so" in text]
    assert f"KeyError: 'five'; problem {recorded[3]['problem']}, answer \"{recorded[3]['completion']}\"" in said
    for entry in read_journal(bench.folder / "fails" / "journal.jsonl").entries:
        assert entry.dropped == ()
        assert all(entry.fitness)
    bench.train("none", task=Fails(), steps=1, log=LogConfig(samples=0, completions=0))
    assert rows(bench.folder / "none", "completions.jsonl") == []


def test_of_several_samples_the_one_that_failed_is_recorded(bench: Bench) -> None:
    class Fails(Near):
        seen = 0

        def reward(self, member: int, value: float, problem: Mapping[str, Any]) -> float:
            self.seen += member == 5
            if member == 5 and self.seen % 2 == 0:
                raise KeyError("the second of each two")
            return super().reward(member, value, problem)

    sampling = SamplingConfig(prompts_per_step=2, samples_per_prompt=2, max_tokens=9, temperature=0.7)
    metrics = bench.train("run", task=Fails(), steps=1, sampling=sampling).metrics
    assert metrics[1]["rewards/failed"] == 2
    recorded = rows(bench.folder / "run", "completions.jsonl")
    assert [(row["member"], row["detail"]) for row in recorded][3] == (5, "reward_failed")


USERS = """
import os
from rewards import Score

class Mine:
    def __init__(self, how):
        self.how = how
    stop = "\\n"
    def problems(self, split):
        count = 10 if split == "train" else 5
        return [{"id": f"{split}-{n}", "x": [n, 7 - n, 3, 5], "target": 2 + 0.3 * n} for n in range(count)]
    def prompt(self, problem):
        return "?"
    def score(self, completion, problem):
        member, value = completion.split()
        if member == "5" and problem["x"][0] % 4 == 0:
            if self.how == "raises":
                1 / 0
            while self.how == "loops":
                pass
            if self.how == "exits":
                os._exit(0)
        reward = -abs(float(value) - problem["target"])
        return Score(reward, reward > -0.5, "near")
"""


def test_every_key_of_a_row_is_documented(bench: Bench) -> None:
    bench.train("rewards")
    for name, changes in {"reused": {"answer_reuse": 2, "max_drift": 1.0}, "skipping": {"skip_tied": True}}.items():
        bench.train(name, **PROBABILITIES | {"es": dataclasses.replace(PROBABILITIES["es"], **changes)})
    seen = {key for name in ("rewards", "reused", "skipping") for row in rows(bench.folder / name) for key in row}
    assert undocumented(seen) == set()
    assert {"twins/differ", "weights/drift", "problems/skipped", "eval/won", "tokens/scored"} <= seen


def test_a_users_score_that_loops_or_exits_ends_like_one_that_raises(bench: Bench) -> None:
    """The whole run: weights, journal, completions, metrics, evaluations. Without bad answers it is like one here."""
    limits = RewardConfig(timeout_seconds=2.0)
    (bench.folder / "users.py").write_text(USERS)
    for name in ("good", "raises", "loops", "exits"):
        task = load_task("users.py:Mine", {"how": name}, base_dir=bench.folder)
        outcome = bench.train(name, task=task, steps=1, reward=limits)
        assert outcome.metrics[1]["rewards/failed"] == (0 if name == "good" else 2)
    ours = Near()
    ours.file_hash = hashlib.sha256(USERS.encode()).hexdigest()  # type: ignore[attr-defined]  # as in the journal
    bench.train("ours", task=ours, steps=1)
    same_run(bench.folder / "good", bench.folder / "ours")
    for name in ("loops", "exits"):
        same_run(bench.folder / "raises", bench.folder / name)
    said = [text for text in bench.display.messages if "score() failed, so" in text]
    assert [text.partition("counts the others: ")[2].partition(";")[0] for text in said] == [
        "ZeroDivisionError: division by zero",
        "score() took longer than 2 s",
        "score() ended its process with status 0",
    ]


def test_half_of_the_members_may_be_dropped_and_no_more(bench: Bench) -> None:
    assert bench.train("half", task=NotFinite(0, 3), steps=1).metrics[1]["members/dropped"] == 4
    before = None

    def remember(engine: FakeEngine) -> None:
        nonlocal before
        before = engine.checksum()

    bench.prepare_engine = remember
    said = (
        r"step 1: 6 of 8 members were dropped for a NaN or infinite reward: .*; the first: nan for problem train-\d, "
    )
    with pytest.raises(TaskError, match=said):
        bench.train("more", task=NotFinite(0, 3, 4), steps=1)
    assert not read_journal(bench.folder / "more" / "journal.jsonl").entries
    assert bench.engine.checksum() == before


def test_a_grader_that_always_fails_stops_the_run_with_its_traceback(bench: Bench) -> None:
    class Broken(Near):
        def reward(self, member: int, value: float, problem: Mapping[str, Any]) -> float:
            raise KeyError("no_such_column")

    with pytest.raises(TaskError, match=r"failed on all 24 completions .*(?s:.)*KeyError: 'no_such_column'"):
        bench.train("run", task=Broken())
    assert not read_journal(bench.folder / "run" / "journal.jsonl").entries


def test_the_minutes_end_the_run_and_evaluation_does_not_count(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def pass_time(requests: Sequence[Request]) -> None:
        clock[0] += 1000 if requests[0].member is None else 30

    bench.prepare_engine = lambda engine: setattr(engine, "on_generate", pass_time)
    outcome = bench.train("run", steps=0, minutes=1.0, eval=EvalConfig(every=1))
    assert (outcome.steps, outcome.wall_time) == (2, 60.0)
    assert [row["wall_time"] for row in outcome.metrics] == [0.0, 30.0, 60.0]
    assert [left for _, _, left in bench.display.steps] == [30.0, 0.0]

    again = bench.train("run", "resume", steps=0, minutes=1.0, eval=EvalConfig(every=1))
    assert (again.steps, again.metrics) == (2, outcome.metrics)
    longer = bench.train("run", "resume", steps=0, minutes=1.6, eval=EvalConfig(every=0))
    assert (longer.steps, longer.wall_time) == (4, 120.0)


def test_the_first_limit_reached_ends_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def pass_time(requests: Sequence[Request]) -> None:
        clock[0] += 10

    bench.prepare_engine = lambda engine: setattr(engine, "on_generate", pass_time)
    assert bench.train("steps", steps=2, minutes=1.0).steps == 2
    # 10 s a step: 10 s for the one step left, not the 50 s that the minutes would allow.
    assert [left for _, _, left in bench.display.steps] == [10.0, 0.0]
    shown = [(course.fraction, course.seconds_left) for course in bench.display.courses]
    assert shown == [(0, None), (0, None), (0.5, 10.0), (1, 0.0)]  # of 2 steps; the minute would be over by a third
    best = [course.best for course in bench.display.courses]
    accuracies = [accuracy for _, accuracy in bench.display.evaluations]
    assert best == [None, accuracies[0], accuracies[0], max(accuracies)]
    bench.display.courses.clear()
    assert bench.train("minutes", steps=100, minutes=0.5).steps == 3
    assert [course.fraction for course in bench.display.courses] == [0, 0, *(pytest.approx(n / 3) for n in (1, 2, 3))]


@pytest.mark.parametrize(
    ("every", "steps", "evaluated"), [(2, 5, [0, 2, 4, 5]), (0, 3, [0, 3]), (1, 2, [0, 1, 2]), (5, 5, [0, 5])]
)
def test_evaluations_come_at_the_start_at_the_cadence_and_at_the_end(
    bench: Bench, every: int, steps: int, evaluated: list[int]
) -> None:
    outcome = bench.train("run", steps=steps, eval=EvalConfig(every=every, max_tokens=7))
    assert [row["step"] for row in outcome.metrics if "eval/accuracy" in row] == evaluated
    assert [step for step, _ in bench.display.evaluations] == evaluated
    assert outcome.last["eval/accuracy"] == bench.display.evaluations[-1][1]
    assert outcome.last["eval/problems"] == 5
    # Evaluation is greedy, whatever sampling is, with its own length and the task's stop strings.
    assert bench.engine.decodings[0] == Decoding(max_tokens=7, stop=("\n",))


def test_evaluation_takes_the_length_of_sampling_when_it_has_none(bench: Bench) -> None:
    sampling = SamplingConfig(prompts_per_step=2, samples_per_prompt=2, max_tokens=9, temperature=0.7, top_p=0.9)
    bench.train("run", steps=1, sampling=sampling, eval=EvalConfig(every=0))
    assert bench.engine.decodings == [
        Decoding(max_tokens=9, stop=("\n",)),
        Decoding(max_tokens=9, temperature=1.0, stop=("\n",)),  # by which the divergence from the base is measured
        Decoding(max_tokens=9, temperature=0.7, top_p=0.9, stop=("\n",)),
        Decoding(max_tokens=9, stop=("\n",)),
    ]


def test_evaluation_penalises_and_stops_as_training_does(bench: Bench) -> None:
    """What only cuts the distribution means nothing to greedy decoding; stop texts come after those of the task."""
    drawn = {"temperature": 0.7, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "thinking_token_budget": 3}
    sampling = SamplingConfig(prompts_per_step=2, max_tokens=9, stop=("###", "\n"), **drawn)
    bench.train("run", steps=1, sampling=sampling, eval=EvalConfig(every=0))
    evaluated = Decoding(max_tokens=9, repetition_penalty=1.2, thinking_token_budget=3, stop=("\n", "###"))
    trained = Decoding(max_tokens=9, stop=("\n", "###"), **drawn)
    assert [bench.engine.decodings[i] for i in (0, 2, 3)] == [evaluated, trained, evaluated]
    settings, _ = read_samples(sorted((bench.folder / "run" / "evaluations").iterdir())[0])
    assert (settings["repetition_penalty"], settings["thinking_token_budget"]) == (1.2, 3)


def test_checkpoints_come_at_the_cadence_and_old_ones_go(bench: Bench) -> None:
    bench.train("run", steps=7, checkpoint=CheckpointConfig(every=2, keep=2))
    folder = bench.folder / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000004", "step-000006"]
    metadata = verify_checkpoint(folder / "step-000006").metadata
    assert metadata["wall_time"] == rows(bench.folder / "run")[6]["wall_time"]
    bench.train("none", steps=3, checkpoint=CheckpointConfig(every=0))
    assert list((bench.folder / "none" / "checkpoints").iterdir()) == []
    assert (bench.folder / "none" / "final" / "model.safetensors").is_file()


def test_what_saving_takes_is_in_the_next_row(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = recorder.save_checkpoint

    def slow(*arguments: Any) -> Path:
        time.sleep(0.3)
        return real(*arguments)

    monkeypatch.setattr(recorder, "save_checkpoint", slow)
    checkpoint = CheckpointConfig(every=2, best=False)
    seconds = [row["time/save"] for row in bench.train("run", steps=4, checkpoint=checkpoint).metrics[1:]]
    assert seconds[2] > 0.3 > max(seconds[0], seconds[1], seconds[3]) > 0


def test_what_a_row_says(bench: Bench) -> None:
    es = dataclasses.replace(CONFIG.es, learning_rate_schedule="linear", schedule_end=0.5, sigma_schedule="linear")
    metrics = bench.train("run", steps=3, es=es).metrics
    assert [row["learning_rate"] for row in metrics[1:]] == pytest.approx([0.02, 0.015, 0.01])
    assert [row["sigma"] for row in metrics[1:]] == pytest.approx([0.05, 0.0375, 0.025])
    row = metrics[1]
    assert (row["completions"], row["completions/truncated"]) == (MEMBERS * PROMPTS, 0.0)
    assert (row["tokens/prompt"], row["tokens/generated"]) == (MEMBERS * PROMPTS * 4, MEMBERS * PROMPTS * 3)
    assert row["throughput/tokens_per_second"] == pytest.approx(MEMBERS * PROMPTS * 7 / row["time/sample"])
    assert row["throughput/generated_per_second"] == pytest.approx(MEMBERS * PROMPTS * 3 / row["time/sample"])
    assert (row["time/noise"], row["time/update"], row["time/serve"]) == (0.5, 0.25, 0.125)
    assert row["time/step"] == row["wall_time"]
    assert row["fitness/std"] == pytest.approx(1)
    assert row["members/dropped"] == row["prompts/tied"] == 0


def test_a_run_knows_how_far_it_is_from_the_base_model(bench: Bench) -> None:
    """At each evaluation, by answers of step 0, also when it was interrupted between; an older run has none."""
    whole = bench.train("whole", steps=4).metrics
    at = {row["step"]: row["base/divergence"] for row in whole if "base/divergence" in row}
    assert at.keys() == {2, 4}
    assert 0 < at[2] < at[4]
    still = dataclasses.replace(CONFIG.es, learning_rate=1e-12)
    assert bench.train("still", es=still).last["base/divergence"] == pytest.approx(0, abs=1e-9)
    bench.train("half", steps=2)
    bench.train("half", "resume", steps=4)
    same_run(bench.folder / "whole", bench.folder / "half")
    bench.train("old", steps=2)
    (bench.folder / "old" / "reference.json").unlink()
    assert "base/divergence" not in bench.train("old", "resume", steps=4).last


def test_twins_are_compared_answer_by_answer() -> None:
    """Two pairs, two problems: 4 pairs of answers, of which 2 differ and 1 in that the other could not be read."""
    right, wrong, unread = Score(1.0, True, "correct"), Score(0.0, False, "wrong_value"), Score(0.0, False, "no_marker")
    scores = [right, wrong, wrong, unread, right, right, unread, right]
    said = Completion(text="", token_ids=(1,), truncated=False, prompt_tokens=1)
    rollouts = [
        ScoredRollout(member=i // 2, prompt=i % 2, sample=0, completion=said, score=score)
        for i, score in enumerate(scores)
    ]
    assert twin_metrics(rollouts, 4) == {"twins/differ": 0.5, "twins/unread": 0.5}
    assert twin_metrics([rollouts[1], rollouts[2]], 2) == {"twins/differ": 0.0}


def test_completions_shown_and_recorded_are_of_different_members_and_problems(bench: Bench) -> None:
    bench.train("run", steps=2)
    recorded = rows(bench.folder / "run", "completions.jsonl")
    assert [row["step"] for row in recorded] == [1] * 4 + [2] * 4
    for step, shown, _ in bench.display.steps:
        mine = [row for row in recorded if row["step"] == step]
        assert shown == mine[:2]
        assert len({row["member"] for row in mine}) == 4
        assert len({row["problem"] for row in mine}) == PROMPTS
        for row in mine:
            assert row["completion"].split()[0] == str(row["member"])
            assert row["problem"].startswith("train-")
            assert row["question"] == f"What of {row['problem']}?"
            assert (row["detail"], row["correct"]) == ("near", row["reward"] > -0.5)


@pytest.mark.parametrize(("when", "step", "saved"), [("sampling", 3, 2), ("evaluation", 2, 1), ("base", 0, 0)])
def test_when_the_engine_fails_it_is_said_how_to_go_on_and_nothing_is_lost(
    bench: Bench, when: str, step: int, saved: int
) -> None:
    """In a step, in the evaluation after one, whose metrics are not written yet, and in that of the base model."""
    failure = RuntimeError("an illegal memory access")

    def prepare(engine: FakeEngine) -> None:
        def fail(requests: Sequence[Request]) -> None:
            at = engine.noise.step if hasattr(engine, "noise") else 0
            if at == step and (requests[0].member is None) == (when != "sampling"):
                raise EngineError("the inference engine failed in sampling: RuntimeError.") from failure

        engine.on_generate = fail

    bench.prepare_engine = prepare
    with pytest.raises(TrainingError) as info:
        bench.train("run")
    run = bench.folder / "run"
    assert str(info.value) == (
        f"step {step}: the inference engine failed in sampling: RuntimeError. The journal is on disk up to step "
        f"{saved}; resume with: {command('resume', run)}"
    )
    assert info.value.__cause__ is not None
    assert info.value.__cause__.__cause__ is failure
    assert bench.engine.closed
    bench.prepare_engine = lambda engine: None
    bench.train("run", "resume")
    bench.train("whole")
    same_run(run, bench.folder / "whole")
