"""`tune` finds the sigma whose members are as far from the weights as they should be, whatever the model."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engine import CONFIG, FakeEngine, Near, problem_set

from eggroll_llm.config.schema import RunConfig, SamplingConfig
from eggroll_llm.errors import ConfigError, ModelError, TrainingError
from eggroll_llm.es.likelihood import divergence
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.es.sizes import DIVERGENCE, learning_rate_for
from eggroll_llm.training.prepare import Prepared
from eggroll_llm.tuning import tune as tuning
from eggroll_llm.tuning.tune import Tuned, tune

STEPS = dataclasses.replace(CONFIG, steps=40, sampling=SamplingConfig(prompts_per_step=1, max_tokens=9))


def tuned(
    folder: Path, monkeypatch: pytest.MonkeyPatch, config: RunConfig, kind: type[FakeEngine] = FakeEngine
) -> tuple[Tuned, FakeEngine]:
    engines: list[FakeEngine] = []

    def prepare(config: RunConfig, recipe_dir: Path) -> Prepared:
        train, held_out = (problem_set(Near(), split) for split in ("train", "test"))
        return Prepared(config=config, task=Near(), model_dir=folder, train=train, held_out=held_out)

    def start(*_: Any, es: Any, **__: Any) -> FakeEngine:
        engines.append(kind(dataclasses.replace(config, es=es), folder / "journal.jsonl"))
        return engines[-1]

    monkeypatch.setattr(tuning, "prepare", prepare)
    monkeypatch.setattr(tuning, "check_memory", lambda prepared: None)
    monkeypatch.setattr(tuning, "start_engine", start)
    try:
        return tune(config, folder, lambda text: None), engines[0]
    finally:
        assert all(engine.closed for engine in engines)


@pytest.mark.parametrize("fitness_from", ["rewards", "probabilities"])
def test_members_of_the_sigma_are_as_far_as_they_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fitness_from: Any
) -> None:
    """Seen by many members of another seed; and the recipe's own sigma plays no part."""
    config = dataclasses.replace(STEPS, es=dataclasses.replace(CONFIG.es, fitness_from=fitness_from))
    found, engine = tuned(tmp_path, monkeypatch, config)
    assert engine.decodings[0].temperature == 1.0
    answers = [(tuple(problem["x"]), (1, 2, 4)) for problem in Near().problems("train")]
    engine.begin(NoiseSpec(seed=99, step=5, rank=2, sigma=found.sigma), 64)
    base_N, *logprob_MN = engine.score(answers, [None, *range(64)])
    assert divergence(torch.stack(logprob_MN), base_N) == pytest.approx(DIVERGENCE, rel=0.5)
    assert found.learning_rate == learning_rate_for(found.sigma, config.es, 40)
    other = dataclasses.replace(config, es=dataclasses.replace(config.es, sigma=10.0, population=2))
    assert tuned(tmp_path, monkeypatch, other)[0] == found


def test_a_model_that_does_not_change_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(FakeEngine):
        def score(self, completions: Any, members: Any, temperature: float = 1.0) -> torch.Tensor:
            return super().score(completions, [None for _ in members], temperature)

    with pytest.raises(TrainingError, match=r"no sigma was found .*\(0 at sigma 0\.001, 0 at sigma 0\.008"):
        tuned(tmp_path, monkeypatch, STEPS, Deaf)


def test_a_model_that_cannot_score_is_refused_with_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unknown(FakeEngine):
        def score(self, completions: Any, members: Any, temperature: float = 1.0) -> torch.Tensor:
            raise ModelError("this architecture cannot score completions")

    with pytest.raises(ModelError, match=r"cannot score completions: set es.sigma and es.learning_rate by hand"):
        tuned(tmp_path, monkeypatch, STEPS, Unknown)


def test_what_cannot_be_tuned_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"steps = 0: .* --steps N"):
        tune(dataclasses.replace(CONFIG, steps=0, minutes=3.0), Path(), pytest.fail)
    with pytest.raises(ConfigError, match='method = "grpo"'):
        tune(dataclasses.replace(CONFIG, method="grpo"), Path(), pytest.fail)
