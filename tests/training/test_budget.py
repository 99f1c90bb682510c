"""What a configuration will cost, against numbers worked out by hand for a tiny model."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from eggroll_llm.config.schema import EngineConfig, GrpoConfig, RunConfig, SamplingConfig
from eggroll_llm.engine.memory import ModelShape, es_parts
from eggroll_llm.errors import ConfigError
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.models.files import read_config, tensor_shapes
from eggroll_llm.models.targets import trained_parameters
from eggroll_llm.system.hardware import GIB
from eggroll_llm.tasks.prompts import ProblemSet
from eggroll_llm.training.budget import _parts, budget, check_memory
from eggroll_llm.training.prepare import Prepared
from eggroll_llm.training.step_time import Machine, Model, estimate_lines, measure, model_sizes, sampled, step_seconds

# Of a layer: q and o 128 x 128, k and v 64 x 128, gate and up 256 x 128, down 128 x 256; two layers.
WEIGHTS = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)
WIDTH = 2 * (2 * (128 + 128) + 2 * (64 + 128) + 3 * (256 + 128))
LARGEST, WIDEST = 256 * 128, 256 + 128
ES = EsSettings(population=6, sigma=0.01, learning_rate=0.01, rank=4)


def every_and_head(model_dir: Path) -> tuple[int, int]:
    """All weights, and those of the head, which is tied to the embeddings."""
    shapes = tensor_shapes(model_dir)
    return sum(map(math.prod, shapes.values())), math.prod(shapes["model.embed_tokens.weight"])


def prepared(model_dir: Path, **changes: Any) -> Prepared:
    config = RunConfig(
        task="countdown",
        steps=10,
        sampling=SamplingConfig(prompts_per_step=3, samples_per_prompt=2, max_tokens=50, temperature=1.0),
        es=ES,
        engine=EngineConfig(slots=5, kv_cache_gib=0.5, dtype="bfloat16"),
    )
    none: Any = None
    config = dataclasses.replace(config, **changes)
    return Prepared(
        config=dataclasses.replace(config, engine=dataclasses.replace(config.engine, max_sequences=128)),
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
    assert lines(model, steps=0, minutes=1.0)[3] == "in all: at most 1 minute of training"


def test_members_that_score_answers_generate_none(model: Path) -> None:
    es = dataclasses.replace(ES, fitness_from="probabilities")
    assert lines(model, es=es)[1:5] == [
        "per step: 6 completions = 3 prompts x 2 samples",
        "per step: 150 prompt tokens (25 each), at most 300 generated",
        "per step: 6 members score them, a pass of each over prompts and completions that generates nothing",
        "in all: 10 steps, 60 completions",
    ]
    again = lines(model, es=dataclasses.replace(es, answer_reuse=3))
    assert again[3].endswith("that generates nothing, the same completions for up to 3 steps")
    assert again[4] == "in all: 10 steps, at least 24 completions"


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
    every, head = every_and_head(model)
    parts = {
        f"served weights ({dtype})": size * (every + head),
        "slots": size * 5 * 4 * WIDTH,
        "activations (estimate)": size * 4096 * (3 * 256 + 4 * 128) + 8 * 128 * head // 128,
        "masters (float32)": 4 * WEIGHTS,
        "optimizer": 4 * tensors * WEIGHTS,
        "noise of a step": size * 3 * 4 * WIDTH,
        "an update": 4 * LARGEST * (tensors > 0) + 4 * 3 * 4 * WIDEST + 2 * size * LARGEST,
        "a checkpoint": 2 * WEIGHTS if size == 2 else 0,
        "key-value cache": 512,
    }
    parts = {name: amount for name, amount in parts.items() if amount}
    assert memory[:-1] == [f"{amount / 1024:.2f} GiB for {name}" for name, amount in parts.items()]
    assert memory[-1].startswith(f"{sum(parts.values()) / 1024:.2f} GiB for these together")


def test_a_gib_is_one(model: Path) -> None:
    assert GIB == 1024**3
    assert "memory: 0.50 GiB for key-value cache" in lines(model)


def test_memory_of_grpo(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights, embeddings too, and beside them what grows with the micro batch."""
    monkeypatch.setattr("eggroll_llm.training.budget.GIB", 1024)
    weights = sum(math.prod(shape) for shape in tensor_shapes(model).values())
    memory = [
        line.removeprefix("memory: ")
        for line in lines(model, method="grpo", grpo=GrpoConfig(learning_rate=1e-5, micro_batch=2, dtype="bfloat16"))
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
    sizes = read_config(model)
    each = 32 * sizes["hidden_size"] + 8 * sizes["intermediate_size"]
    activations = 2 * 90 * sizes["num_hidden_layers"] * each / 1024
    assert memory[-1].endswith(f"the activations of 2 completions of at most 90 tokens, up to {activations:.2f} GiB")


def test_activations_that_are_checkpointed_are_not_counted(model: Path) -> None:
    grpo = GrpoConfig(learning_rate=1e-5, micro_batch=2, gradient_checkpointing=True)
    assert lines(model, method="grpo", grpo=grpo)[-1].endswith("the activations of 2 completions of at most 90 tokens")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_activations_are_what_autograd_saves(model: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As more of it for more completions, so that weights and their copies in bfloat16 drop out."""
    monkeypatch.setattr("eggroll_llm.training.budget.GIB", 1)
    decoder = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).base_model

    def told(completions: int) -> float:
        grpo = GrpoConfig(learning_rate=1e-5, micro_batch=completions, dtype=dtype)
        return float(lines(model, method="grpo", grpo=grpo)[-1].split()[-2])

    def saved(completions: int) -> int:
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
        ):
            decoder(torch.ones(completions, 90, dtype=torch.long), use_cache=False)
        return sum(storage.nbytes() for storage in kept.values())

    assert saved(6) - saved(2) == pytest.approx(told(6) - told(2), rel=0.15)


MEMBER = 2 * 4 * WIDTH  # bytes, in bfloat16 at rank 4


@pytest.fixture
def needed(model: Path) -> int:
    """What the run takes by its own count, of which `test_memory` has the parts."""
    return sum(part.size for part in _parts(prepared(model)))


def refused(monkeypatch: pytest.MonkeyPatch, run: Prepared, available: int | None) -> str:
    """What is said where this much memory is available; empty when nothing is."""
    monkeypatch.setattr("eggroll_llm.training.budget.available_memory", lambda: available)
    monkeypatch.setattr("eggroll_llm.training.budget.serves_on_cpu", lambda: True)
    try:
        check_memory(run)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_run_that_fits_or_may_fit_is_not_refused(model: Path, needed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(monkeypatch, prepared(model), needed) == ""
    assert refused(monkeypatch, prepared(model), None) == ""
    assert refused(monkeypatch, prepared(model), needed - 1) != ""


def test_when_the_cache_is_too_large_it_is_said_how_far_to_lower_it(
    model: Path, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of a GiB too much, which slots and population of a tiny model cannot save."""
    run = prepared(model)
    said = refused(monkeypatch, run, needed - GIB // 4)
    assert said.startswith("the run needs 0.51 GiB of memory (served weights (bfloat16) 0.00, slots 0.00, activations ")
    assert "key-value cache 0.50) besides Python and vLLM, and 0.26 GiB are available: " in said
    assert said.endswith("lower engine.kv_cache_gib from 0.5 to 0.24")
    lower = dataclasses.replace(run.config.engine, kv_cache_gib=0.24)
    assert refused(monkeypatch, prepared(model, engine=lower), needed - GIB // 4) == ""


@pytest.mark.parametrize(("key", "value"), [("engine.kv_cache_gib", 0.49), ("engine.slots", 3), ("es.population", 2)])
def test_each_setting_is_lowered_by_what_it_saves(
    model: Path, needed: int, monkeypatch: pytest.MonkeyPatch, key: str, value: Any
) -> None:
    """Two slots' worth too much, and a byte less than that is not; each remedy alone is enough."""
    run = prepared(model)
    available = needed - 2 * MEMBER
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


def test_engines_of_this_machine_are_counted(model: Path, needed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has all of it; those of a cluster may be elsewhere."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    three = prepared(model, engine=EngineConfig(slots=5, kv_cache_gib=0.5, dtype="bfloat16", replicas=3))
    assert refused(monkeypatch, three, 3 * needed) == ""
    said = refused(monkeypatch, three, 3 * needed - 1)
    assert "(for each of 3 engines: served weights (bfloat16) 0.00, " in said
    assert "lower engine.replicas from 3 to 2, or engine.kv_cache_gib from 0.5 to 0.49" in said
    assert f"memory: {3 * needed / GIB:.2f} GiB for 3 engines on this machine" in budget(three)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert refused(monkeypatch, three, needed) == ""
    assert budget(three)[-1] == "memory: for each of 3 engines"


def test_when_no_setting_alone_is_enough_all_are_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(monkeypatch, prepared(model), 0)
    assert "0 GiB are available: 0.51 GiB too much, which none of these saves alone: engine.kv_cache_gib = 0.5 " in said
    assert "engine.slots = 5 (each 1 is " in said
    assert "es.population = 6 (each 2 is " in said
    assert said.endswith("; or use a smaller model")


def test_noise_that_is_not_kept_is_no_reason_to_lower_the_population(
    model: Path, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eggroll_llm.engine.memory.KEPT_BYTES", 0)
    assert refused(monkeypatch, prepared(model), needed - 3 * MEMBER) == ""
    assert "es.population" not in refused(monkeypatch, prepared(model), needed - 4 * MEMBER)


def test_memory_that_grpo_lacks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(math.prod(shape) for shape in tensor_shapes(model).values())
    needed = (4 + 4 + 8 + 2 + 4) * weights + GIB // 2  # weights, gradients, optimizer, served, the base model's copy
    run = prepared(model, method="grpo", grpo=GrpoConfig(learning_rate=1e-5, beta=0.04, micro_batch=2))
    assert refused(monkeypatch, run, needed) == ""
    said = refused(monkeypatch, run, needed - 4 * weights)
    assert "; and what passes over grpo.micro_batch completions take) besides" in said
    assert said.endswith(", or grpo.beta from 0.04 to 0, or train adapters, such as with grpo.lora_rank = 16")
    # Each of three engines has the served weights and a cache, and the trainer alone the copy.
    three = dataclasses.replace(
        run,
        config=dataclasses.replace(
            run.config, engine=EngineConfig(slots=5, kv_cache_gib=0.5, dtype="bfloat16", replicas=3)
        ),
    )
    assert "grpo.beta" not in refused(monkeypatch, three, needed + 2 * (2 * weights + GIB // 2) - 4 * weights - 1)
    without = prepared(model, method="grpo", grpo=GrpoConfig(learning_rate=1e-5, micro_batch=2))
    assert refused(monkeypatch, without, needed - 4 * weights) == ""


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("masters", ["float32", "split"])
def test_served_weights_and_masters_by_format(model: Path, masters: Any, quantization: Any) -> None:
    """On a GPU, where split masters of bfloat16 need no weights of their own; FP8 has a scale for each row."""
    every, _ = every_and_head(model)
    shape = ModelShape.of(read_config(model), tensor_shapes(model))
    engine = EngineConfig(slots=5, dtype="bfloat16", quantization=quantization)
    parts = es_parts(shape, dataclasses.replace(ES, masters=masters), engine, on_cpu=False)
    found = {part.name.split(" (")[0]: part.size for part in parts}
    rows = 2 * (2 * 128 + 2 * 64 + 2 * 256 + 128)
    assert found["served weights"] == (2 * every if quantization == "none" else 2 * every - WEIGHTS + 4 * rows)
    per_weight = {"float32": 4, "split": 2 if quantization == "none" else 4}[masters]
    assert found["masters"] == per_weight * WEIGHTS


def test_devices_of_an_engine_share_what_it_takes(model: Path, gpu: dict[str, int]) -> None:
    """Half of every weight and its master, and of B or A of every factor; two heads of k and v, so copies from 4 on."""

    def parts(ranks: int, *, on_cpu: bool = False) -> dict[str, int]:
        shape = ModelShape.of(read_config(model), tensor_shapes(model))
        engine = EngineConfig(slots=5, dtype="bfloat16", tensor_parallel=ranks)
        return {part.name.split(" (")[0]: part.size for part in es_parts(shape, ES, engine, on_cpu=on_cpu)}

    one, two, four = parts(1), parts(2), parts(4)
    assert two["masters"] == one["masters"] // 2
    copies = 2 * 2 * 64 * 128 // 4  # of k and v in two layers, a quarter more of each
    assert four["masters"] == one["masters"] // 4 + 4 * copies
    rows = 2 * (128 + 2 * 64 + 128 + 2 * 256 + 128), 2 * (3 * 128 + 128 + 2 * 128 + 256)  # of all A, of all B
    whole_A, whole_B = 2 * 2 * 128, 2 * (3 * 128 + 2 * 128)  # of o and down, of all else
    assert one["slots"] == 5 * 2 * ES.rank * sum(rows)
    assert two["slots"] == 5 * 2 * ES.rank * (sum(rows) + whole_A + whole_B) // 2
    assert two["a checkpoint"] == one["a checkpoint"]
    assert parts(2, on_cpu=True)["masters"] == parts(1, on_cpu=True)["masters"]  # both halves are in one memory
    lines = budget(prepared(model, engine=EngineConfig(slots=5, dtype="bfloat16", tensor_parallel=2)))
    assert lines[-1] == "memory of the GPU: of each of 2 that an engine has"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A GPU of one GiB that is not there; what is free of it may be changed."""
    free = {"bytes": GIB}
    monkeypatch.setattr("eggroll_llm.training.budget.serves_on_cpu", lambda: False)
    monkeypatch.setattr("eggroll_llm.engine.start.serves_on_cpu", lambda: False)
    monkeypatch.setattr("eggroll_llm.training.budget.available_memory", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free["bytes"], GIB))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=GIB))
    return free


UPDATE = 4 * 3 * 4 * WIDEST  # what the factors of three pairs of rank 4 take in float32


@pytest.mark.parametrize(
    ("masters", "offload", "beside"),
    [
        ("float32", False, UPDATE),
        ("split", False, UPDATE + 4 * LARGEST),
        ("float32", True, UPDATE + 4 * LARGEST),
        ("split", True, UPDATE + 4 * LARGEST),
    ],
)
def test_of_a_gpu_what_lies_beside_vllms_share_must_be_free(
    model: Path, gpu: dict[str, int], masters: Any, offload: bool, beside: int
) -> None:
    engine = EngineConfig(slots=5, dtype="bfloat16", gpu_memory_utilization=0.5, offload_masters=offload)
    run = prepared(model, engine=engine, es=dataclasses.replace(ES, masters=masters))
    gpu["bytes"] = GIB // 2 + beside
    check_memory(run)
    gpu["bytes"] -= 1
    with pytest.raises(
        ConfigError, match=r"^engine\.gpu_memory_utilization = 0\.5: 0\.50 GiB.* lower it to 0\.49, or"
    ) as info:
        check_memory(run)
    assert ('set es.masters to "split"' in str(info.value)) == (masters == "float32" and not offload)
    assert ("set engine.offload_masters to true" in str(info.value)) == (not offload)


def test_the_activations_of_grpo_must_fit_beside_the_share(model: Path, gpu: dict[str, int]) -> None:
    weights = sum(math.prod(shape) for shape in tensor_shapes(model).values())
    sizes = read_config(model)
    activations = 2 * 90 * sizes["num_hidden_layers"] * (32 * sizes["hidden_size"] + 8 * sizes["intermediate_size"])
    run = prepared(
        model,
        method="grpo",
        grpo=GrpoConfig(learning_rate=1e-5, micro_batch=2, dtype="bfloat16"),
        engine=EngineConfig(slots=5, dtype="bfloat16", gpu_memory_utilization=0.5),
    )
    gpu["bytes"] = GIB // 2 + (4 + 4 + 8) * weights + activations
    check_memory(run)
    assert "activations of 2 completions" not in budget(run)[-1]  # they are counted
    gpu["bytes"] -= 1
    with pytest.raises(ConfigError, match=r"lower it to 0\.49, or set grpo\.gradient_checkpointing to true \(up to"):
        check_memory(run)
    checkpointed = dataclasses.replace(
        run.config, grpo=dataclasses.replace(run.config.grpo, gradient_checkpointing=True)
    )
    check_memory(dataclasses.replace(run, config=checkpointed))


def test_weights_beneath_adapters_are_counted_as_they_are_kept(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eggroll_llm.training.budget.GIB", 1024)
    weights = sum(math.prod(shape) for shape in tensor_shapes(model).values())
    layers = trained_parameters(model)
    adapted, trained = sum(out * inside for _, out, inside in layers), sum(out + inside for _, out, inside in layers)
    for dtype, beneath in (("bfloat16", 2), ("float32", 4)):
        grpo = GrpoConfig(learning_rate=1e-5, micro_batch=2, dtype=dtype, lora_rank=1)  # type: ignore[arg-type]
        size = 4 * (weights - adapted) + beneath * adapted + 4 * trained
        assert f"memory: {size / 1024:.2f} GiB for weights in training (float32)" in lines(
            model, method="grpo", grpo=grpo
        )


def test_the_share_must_hold_what_is_there_from_the_start(model: Path, gpu: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as info:
        check_memory(prepared(model, engine=EngineConfig(dtype="bfloat16", gpu_memory_utilization=0.001)))
    said = str(info.value)
    assert said.startswith(
        "engine.gpu_memory_utilization = 0.001: 0.00 GiB, but weights, masters, slots and activations"
    )
    raised = float(re.search(r"raise it to ([\d.]+), or set es\.masters", said)[1])  # type: ignore[index]
    check_memory(prepared(model, engine=EngineConfig(dtype="bfloat16", gpu_memory_utilization=raised)))


def test_a_share_that_does_not_hold_the_model_is_not_proposed(model: Path, gpu: dict[str, int]) -> None:
    gpu["bytes"] = GIB // 100
    with pytest.raises(ConfigError) as info:
        check_memory(prepared(model))
    assert "lower it" not in str(info.value)
    assert str(info.value).endswith("less), or use a smaller model")


def test_what_is_offloaded_must_be_free_of_the_host(
    model: Path, gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masters and momentum, and the served weights while a checkpoint is written."""
    host = (4 + 4 + 2) * WEIGHTS
    engine = EngineConfig(slots=5, dtype="bfloat16", gpu_memory_utilization=0.5, offload_masters=True)
    run = prepared(model, engine=engine, es=dataclasses.replace(ES, optimizer="momentum"))
    monkeypatch.setattr("eggroll_llm.training.budget.available_memory", lambda: host)
    check_memory(run)
    monkeypatch.setattr("eggroll_llm.training.budget.available_memory", lambda: host - 1)
    with pytest.raises(ConfigError, match=r"of the host's memory \(masters .* set engine\.offload_masters to false"):
        check_memory(run)


@pytest.mark.parametrize("engine", [{"replicas": 2}, {"replicas": 0}, {"tensor_parallel": 2}])
def test_what_is_free_of_a_gpu_is_not_asked_where_other_processes_have_it(
    model: Path, gpu: dict[str, int], engine: dict[str, int]
) -> None:
    gpu["bytes"] = 0
    enough = EngineConfig(slots=5, dtype="bfloat16", gpu_memory_utilization=0.5)
    check_memory(prepared(model, engine=dataclasses.replace(enough, **engine)))
    with pytest.raises(ConfigError, match=r"0\.00 GiB of the GPU are free"):
        check_memory(prepared(model, engine=enough))
    with pytest.raises(ConfigError, match=r"but 1\.00 GiB of the GPU are there: lower it to"):
        check_memory(prepared(model, engine=dataclasses.replace(enough, gpu_memory_utilization=1.0, **engine)))


def test_the_memory_of_a_gpu_is_told_by_place(
    model: Path, gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    every, head = every_and_head(model)
    inside = 2 * every + 4 * WEIGHTS + 5 * MEMBER + 2 * 8192 * (3 * 256 + 4 * 128) + 8 * 128 * head // 128
    engine = EngineConfig(slots=5, dtype="bfloat16", gpu_memory_utilization=0.5)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (GIB, GIB))
    token = 2 * 2 * 2 * 2 * 32  # bytes, of keys and values, layers, heads and their size
    *_, said = lines(model, engine=engine)
    assert said.endswith(f", {(GIB / 2 - inside) / GIB:.2f} GiB here: {(GIB / 2 - inside) / token:,.0f} tokens")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    *_, said = lines(model, engine=engine)
    assert said.endswith("the key-value cache takes the rest of the share")
    monkeypatch.setattr("eggroll_llm.training.budget.GIB", 1024)
    told = lines(model, engine=engine)
    assert f"memory of the GPU, in vLLM's share: {2 * every / 1024:.2f} GiB for served weights (bfloat16)" in told
    assert f"memory of the GPU, in vLLM's share: {4 * WEIGHTS / 1024:.2f} GiB for masters (float32)" in told
    assert f"memory of the GPU, beside that share: {UPDATE / 1024:.2f} GiB for an update" in told
    assert f"memory of the host: {6 * WEIGHTS / 1024:.2f} GiB for a checkpoint" in told


SLOW = Machine(serving=1e6, training=1e5, bandwidth=1e6, passes=(0.1, 0.1))
SMALL = Model(linear=1000, idle=0, head=500, every=2000, attention=10, trained=1000, members_own=1.0)


def test_time_of_a_step_of_es(model: Path) -> None:
    """36 answers of 50 tokens, all at once, to prompts of 25, of which 10 are the same: 50 passes over 50 positions."""
    tokens = 6 * (10 + 3 * 15) + 36 * 50
    operations = tokens * (2 * 1000 + 4 * 10 * 50) + 2 * (36 + 1800) * 500
    sampling = operations / 1e6 + 50 * 2 * (1000 + 500) / 1e6 + 50 * 0.1
    update = 2 * 1000 * 3 * 4 / 1e5 + (4 + 4 + 2) * 1000 / 1e6  # three pairs of rank 4; masters and served weights
    found = step_seconds(prepared(model), SMALL, SLOW, length=1.0)
    assert found == pytest.approx(sampling + update) == pytest.approx(15.756)
    mixture = dataclasses.replace(SMALL, idle=700)  # experts that a token does not use are read for others
    assert step_seconds(prepared(model), mixture, SLOW, length=1.0) == pytest.approx(found + 50 * 2 * 700 / 1e6)


def test_time_of_a_step_whose_members_score(model: Path) -> None:
    """Six answers of the weights, and a pass of each of six members over them and the prompts."""
    sampling = ((10 + 3 * 15 + 300) * 4000 + 2 * (6 + 300) * 500) / 1e6 + 50 * 2 * 1500 / 1e6 + 50 * 0.1
    scoring = 6 * ((10 + 3 * 15 + 300) * 4000 + 2 * 300 * 500) / 1e6 + 0.1
    update = 2 * 1000 * 3 * 4 / 1e5 + (4 + 4 + 2) * 1000 / 1e6
    es = dataclasses.replace(ES, fitness_from="probabilities")
    found = step_seconds(prepared(model, es=es), SMALL, SLOW, length=1.0)
    assert found == pytest.approx(sampling + scoring + update) == pytest.approx(17.546)
    es = dataclasses.replace(es, answer_reuse=2)  # sampling in every second step
    found = step_seconds(prepared(model, es=es), SMALL, SLOW, length=1.0)
    assert found == pytest.approx(sampling / 2 + scoring + update)
    some = dataclasses.replace(SMALL, trained=250, members_own=0.5)  # the first half of the blocks once for all members
    found = step_seconds(prepared(model, es=es), some, SLOW, length=1.0)
    scoring = (3.5 * (10 + 3 * 15 + 300) * 4000 + 6 * 2 * 300 * 500) / 1e6 + 0.1
    assert found == pytest.approx(sampling / 2 + scoring + update / 4)


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
    assert (found.linear, found.idle, found.head, found.attention) == (WEIGHTS, 0, math.prod(embedding), 2 * 128)
    assert (found.trained, found.members_own) == (WEIGHTS, 1.0)
    second = model_sizes(prepared(model, es=dataclasses.replace(ES, layers=(1, 1))))
    assert (second.linear, second.trained, second.members_own) == (WEIGHTS, WEIGHTS // 2, 0.5)
    lines = estimate_lines(run, SLOW)
    assert lines[0].startswith("time, estimated: ")
    assert "for 25 steps and 4 evaluations" in lines[1]
    slow, fast = (
        float(estimate_lines(run, machine)[0].split()[2]) for machine in (SLOW, dataclasses.replace(SLOW, serving=4e6))
    )
    assert fast < slow / 2
    assert "training ends after 2.5 min" in estimate_lines(prepared(model, minutes=2.5), SLOW)[1]
    assert len(estimate_lines(prepared(model, steps=0, minutes=2.5), SLOW)) == 1


def test_a_token_of_a_mixture_passes_through_some_experts_and_a_batch_through_all(
    tiny_model: Callable[[str], Path],
) -> None:
    """Two of four in one of two blocks; each has gate, up and down of 64 x 128."""
    model_dir = tiny_model("qwen3moe")
    expert, attention, dense = 3 * 64 * 128, 2 * 128 * 128 + 2 * 64 * 128, 3 * 256 * 128
    sizes = model_sizes(prepared(model_dir))
    assert (sizes.linear, sizes.idle) == (2 * attention + dense + 2 * expert, 2 * expert)
    shape = ModelShape.of(read_config(model_dir), tensor_shapes(model_dir))
    assert sizes.trained == shape.linear == 2 * attention + dense


def test_the_machine_is_measured(model: Path) -> None:
    machine = measure(prepared(model))
    assert machine.serving > 1e7
    assert machine.training > 1e7
    assert 1e7 < machine.bandwidth < 1e13
