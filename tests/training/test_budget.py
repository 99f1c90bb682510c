"""What a configuration will cost, against numbers worked out by hand for a tiny model."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eggroll_llm.config.schema import EngineConfig, GrpoConfig, RunConfig, SamplingConfig
from eggroll_llm.errors import ConfigError
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.models.files import tensor_shapes
from eggroll_llm.tasks.prompts import ProblemSet
from eggroll_llm.training.budget import GIB, budget, check_memory
from eggroll_llm.training.prepare import Prepared
from eggroll_llm.training.step_time import Machine, Model, estimate_lines, measure, model_sizes, sampled, step_seconds

# Of a layer: q and o 128 x 128, k and v 64 x 128, gate and up 256 x 128, down 128 x 256; two layers.
WEIGHTS = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)
WIDTH = 2 * (2 * (128 + 128) + 2 * (64 + 128) + 3 * (256 + 128))
ES = EsSettings(population=6, sigma=0.01, learning_rate=0.01, rank=4)


def prepared(model_dir: Path, **changes: Any) -> Prepared:
    config = RunConfig(
        task="countdown",
        steps=10,
        sampling=SamplingConfig(prompts_per_step=3, samples_per_prompt=2, max_tokens=50, temperature=1.0),
        es=ES,
        engine=EngineConfig(slots=5, kv_cache_gib=0.5, dtype="bfloat16"),
    )
    none: Any = None
    return Prepared(
        config=dataclasses.replace(config, **changes),
        task=none,
        model_dir=model_dir,
        train=ProblemSet(problems=[{}] * 4, hashes=[""] * 4, prompts=[(1,) * 10, (1,) * 20, (1,) * 30, (1,) * 40]),
        held_out=ProblemSet(problems=[{}] * 3, hashes=[""] * 3, prompts=[(1,)] * 3),
    )


def lines(model_dir: Path, **changes: Any) -> list[str]:
    return budget(prepared(model_dir, **changes))


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


def test_completions_and_tokens(model: Path) -> None:
    """36 completions with 25 prompt tokens on average and at most 50 generated ones."""
    assert lines(model)[:4] == [
        "problems: 4 for training, 3 held out",
        "per step: 36 completions = 6 members x 3 prompts x 2 samples",
        "per step: 900 prompt tokens (25 each), at most 1,800 generated",
        "in all: 10 steps, 360 completions",
    ]
    assert lines(model, steps=0, minutes=2.5)[3] == "in all: at most 2.5 minutes of training"


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
@pytest.mark.parametrize(("optimizer", "tensors"), [("sgd", 0), ("momentum", 1), ("adam", 2)])
def test_memory(
    model: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, size: int, optimizer: Any, tensors: int
) -> None:
    """In units of a KiB, as a tiny model takes no GiB."""
    monkeypatch.setattr("eggroll_llm.training.budget.GIB", 1024)
    engine = EngineConfig(slots=5, kv_cache_gib=0.5, dtype=dtype)
    memory = [
        line.removeprefix("memory: ")
        for line in lines(model, engine=engine, es=dataclasses.replace(ES, optimizer=optimizer))
        if line.startswith("memory: ")
    ]
    parts = {
        "masters (float32)": 4 * WEIGHTS,
        f"served weights ({dtype})": size * WEIGHTS,
        "slots": size * 5 * 4 * WIDTH,
        "noise of a step": size * 3 * 4 * WIDTH,
    }
    if tensors:
        parts["optimizer"] = 4 * tensors * WEIGHTS
    parts["key-value cache"] = 512
    assert memory[:-1] == [f"{amount / 1024:.2f} GiB for {name}" for name, amount in parts.items()]
    assert memory[-1].startswith(f"{sum(parts.values()) / 1024:.2f} GiB for these together")


def test_a_gib_is_one(model: Path) -> None:
    assert GIB == 1024**3
    assert "memory: 0.50 GiB for key-value cache" in lines(model)


def test_memory_of_grpo(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights, embeddings too, and what grows with the micro batch is named: it cannot be told beforehand."""
    monkeypatch.setattr("eggroll_llm.training.budget.GIB", 1024)
    weights = sum(math.prod(shape) for shape in tensor_shapes(model).values())
    memory = [
        line.removeprefix("memory: ")
        for line in lines(model, method="grpo", grpo=GrpoConfig(learning_rate=1e-5, micro_batch=2))
        if line.startswith("memory: ")
    ]
    parts = {
        "weights in training (float32)": 4 * weights,
        "gradients": 4 * weights,
        "optimizer": 8 * weights,
        "served weights (bfloat16)": 2 * weights,
        "key-value cache": 512,
    }
    assert memory[:-1] == [f"{amount / 1024:.2f} GiB for {name}" for name, amount in parts.items()]
    assert memory[-1].startswith(f"{sum(parts.values()) / 1024:.2f} GiB for these together, besides")
    assert memory[-1].endswith("the activations of 2 completions of at most 90 tokens")


MEMBER = 2 * 4 * WIDTH  # bytes, in bfloat16 at rank 4
NEEDED = (4 + 2) * WEIGHTS + (5 + 3) * MEMBER + GIB // 2  # masters, served, five slots, noise of three pairs, cache


def refused(monkeypatch: pytest.MonkeyPatch, run: Prepared, available: int | None) -> str:
    """What is said where this much memory is available; empty when nothing is."""
    monkeypatch.setattr("eggroll_llm.training.budget.available_memory", lambda: available)
    monkeypatch.setattr("eggroll_llm.training.budget.serves_on_cpu", lambda: True)
    try:
        check_memory(run)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_run_that_fits_or_may_fit_is_not_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(monkeypatch, prepared(model), NEEDED) == ""
    assert refused(monkeypatch, prepared(model), None) == ""
    assert refused(monkeypatch, prepared(model), NEEDED - 1) != ""


def test_when_the_cache_is_too_large_it_is_said_how_far_to_lower_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of a GiB too much, which slots and population of a tiny model cannot save."""
    run = prepared(model)
    said = refused(monkeypatch, run, NEEDED - GIB // 4)
    assert said.startswith("the run needs 0.50 GiB of memory (masters (float32) 0.00, served weights (bfloat16) 0.00, ")
    assert "key-value cache 0.50) besides Python and vLLM, and 0.25 GiB are available: " in said
    assert said.endswith("lower engine.kv_cache_gib from 0.5 to 0.24")
    lower = dataclasses.replace(run.config.engine, kv_cache_gib=0.24)
    assert refused(monkeypatch, prepared(model, engine=lower), NEEDED - GIB // 4) == ""


@pytest.mark.parametrize(("key", "value"), [("engine.kv_cache_gib", 0.49), ("engine.slots", 3), ("es.population", 2)])
def test_each_setting_is_lowered_by_what_it_saves(
    model: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any
) -> None:
    """Two slots' worth too much, and a byte less than that is not; each remedy alone is enough."""
    run = prepared(model)
    available = NEEDED - 2 * MEMBER
    said = refused(monkeypatch, run, available)
    assert said.endswith(
        "lower engine.kv_cache_gib from 0.5 to 0.49, or engine.slots from 5 to 3, or es.population from 6 to 2"
    )
    table, _, name = key.partition(".")
    changed = dataclasses.replace(getattr(run.config, table), **{name: value})
    assert refused(monkeypatch, prepared(model, **{table: changed}), available) == ""
    one_more = {"engine.kv_cache_gib": 0.5, "engine.slots": 4, "es.population": 4}[key]
    changed = dataclasses.replace(getattr(run.config, table), **{name: one_more})
    assert refused(monkeypatch, prepared(model, **{table: changed}), available) != ""


def test_engines_of_this_machine_are_counted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has all of it; those of a cluster may be elsewhere."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    three = prepared(model, engine=EngineConfig(slots=5, kv_cache_gib=0.5, dtype="bfloat16", replicas=3))
    assert refused(monkeypatch, three, 3 * NEEDED) == ""
    said = refused(monkeypatch, three, 3 * NEEDED - 1)
    assert "(for each of 3 engines: masters (float32) 0.00, " in said
    assert "lower engine.replicas from 3 to 2, or engine.kv_cache_gib from 0.5 to 0.49" in said
    assert f"memory: {3 * NEEDED / GIB:.2f} GiB for 3 engines on this machine" in budget(three)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert refused(monkeypatch, three, NEEDED) == ""
    assert budget(three)[-1] == "memory: for each of 3 engines"


def test_when_no_setting_alone_is_enough_all_are_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(monkeypatch, prepared(model), 0)
    assert "0 GiB are available: 0.50 GiB too much, which none of these saves alone: engine.kv_cache_gib = 0.5 " in said
    assert "engine.slots = 5 (each 1 is " in said
    assert "es.population = 6 (each 2 is " in said
    assert said.endswith("; or use a smaller model")


def test_noise_that_is_not_kept_is_no_reason_to_lower_the_population(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eggroll_llm.training.budget.KEPT_BYTES", 0)
    assert refused(monkeypatch, prepared(model), NEEDED - 3 * MEMBER) == ""
    assert "es.population" not in refused(monkeypatch, prepared(model), NEEDED - 4 * MEMBER)


def test_memory_that_grpo_lacks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(math.prod(shape) for shape in tensor_shapes(model).values())
    needed = (4 + 4 + 8 + 2 + 4) * weights + GIB // 2  # weights, gradients, optimizer, served, the base model's copy
    run = prepared(model, method="grpo", grpo=GrpoConfig(learning_rate=1e-5, beta=0.04, micro_batch=2))
    assert refused(monkeypatch, run, needed) == ""
    said = refused(monkeypatch, run, needed - 4 * weights)
    assert "; and what passes over grpo.micro_batch completions take) besides" in said
    assert said.endswith(", or grpo.beta from 0.04 to 0, or train adapters, such as with grpo.lora_rank = 16")
    without = prepared(model, method="grpo", grpo=GrpoConfig(learning_rate=1e-5, micro_batch=2))
    assert refused(monkeypatch, without, needed - 4 * weights) == ""


def test_of_a_gpu_what_lies_beside_vllms_share_must_be_free(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masters and noise; the share holds the rest. No GPU has been asked."""
    beside = 4 * WEIGHTS + 3 * MEMBER
    monkeypatch.setattr("eggroll_llm.training.budget.serves_on_cpu", lambda: False)
    free = {"bytes": GIB // 2 + beside}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free["bytes"], GIB))
    engine = EngineConfig(slots=5, dtype="bfloat16", gpu_memory_utilization=0.5)
    check_memory(prepared(model, engine=engine))
    free["bytes"] -= 1
    with pytest.raises(ConfigError, match=r"^engine\.gpu_memory_utilization = 0\.5: 0\.50 GiB.* lower it to 0\.49, or"):
        check_memory(prepared(model, engine=engine))


SLOW = Machine(serving=1e6, training=1e5, bandwidth=1e6, passes=(0.1, 0.1))
SMALL = Model(linear=1000, head=500, every=2000, attention=10)


def test_time_of_a_step_of_es(model: Path) -> None:
    """36 answers of 50 tokens, all at once, to prompts of 25, of which 10 are the same: 50 passes over 50 positions."""
    tokens = 6 * (10 + 3 * 15) + 36 * 50
    operations = tokens * (2 * 1000 + 4 * 10 * 50) + 2 * (36 + 1800) * 500
    sampling = operations / 1e6 + 50 * 2 * (1000 + 500) / 1e6 + 50 * 0.1
    update = 2 * 1000 * 3 * 4 / 1e5 + (4 + 4 + 2) * 1000 / 1e6  # three pairs of rank 4; masters and served weights
    found = step_seconds(prepared(model), SMALL, SLOW, length=1.0)
    assert found == pytest.approx(sampling + update) == pytest.approx(15.756)


def test_time_of_a_step_of_grpo(model: Path) -> None:
    """Six answers; three passes' worth to train and one before, over 300 tokens of them and 75 of prompts."""
    sampling = ((10 + 3 * 15 + 300) * 4000 + 2 * (6 + 300) * 500) / 1e6 + 50 * 2 * 1500 / 1e6 + 50 * 0.1
    training = 4 * (375 * 4000 + 2 * 300 * 500) / 1e5 + (36 + 4 + 2) * 2000 / 1e6
    grpo = GrpoConfig(learning_rate=1e-5, micro_batch=2)
    found = step_seconds(prepared(model, method="grpo", grpo=grpo), SMALL, SLOW, length=1.0)
    assert found == pytest.approx(sampling + training) == pytest.approx(78.96)


def test_what_prompts_have_in_common_is_computed_once_a_member() -> None:
    prompts = [(1, 2, 3, 4), (1, 2, 5, 6), (1, 2, 3, 7)]
    shared = sampled(prompts, members=6, problems=3, samples=2, length=8)
    assert (shared.prompt_tokens, shared.completions, shared.context) == (6 * (2 + 3 * 2), 36, 8)


def test_the_estimate_of_a_run(model: Path) -> None:
    """Sizes of the tiny model; a faster machine takes less; evaluations at the start and after every tenth step."""
    run = prepared(model, steps=25)
    embedding = tensor_shapes(model)["model.embed_tokens.weight"]
    found = model_sizes(run)
    assert (found.linear, found.head, found.attention) == (WEIGHTS, math.prod(embedding), 2 * 128)
    lines = estimate_lines(run, SLOW)
    assert lines[0].startswith("time, estimated: ")
    assert "for 25 steps and 4 evaluations" in lines[1]
    slow, fast = (
        float(estimate_lines(run, machine)[0].split()[2]) for machine in (SLOW, dataclasses.replace(SLOW, serving=4e6))
    )
    assert fast < slow / 2
    assert "training ends after 2.5 min" in estimate_lines(prepared(model, minutes=2.5), SLOW)[1]
    assert len(estimate_lines(prepared(model, steps=0, minutes=2.5), SLOW)) == 1


def test_the_machine_is_measured(model: Path) -> None:
    machine = measure(prepared(model))
    assert machine.serving > 1e7
    assert machine.training > 1e7
    assert 1e7 < machine.bandwidth < 1e13
