"""The processes of the benchmark: stand-ins for how they are measured, real ones of a tiny model for what they do."""

import errno
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eggroll_llm.bench import plan, run, worker
from eggroll_llm.bench.plan import EAGER, Size, Variant
from eggroll_llm.bench.subject import Subject, of_shape
from eggroll_llm.bench.workload import Times, Workload
from eggroll_llm.cli.main import main
from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.errors import ConfigError, UserError

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SIZE = Size(num_prompts=8, output_len=4)
ES = 'task = "countdown"\nsteps = 1\n[es]\nsigma = 0.01\nlearning_rate = 0.01\n'


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(SHAPE))
    return path


@pytest.fixture(scope="module")
def subject(shape: Path) -> Iterator[Subject]:
    with of_shape(str(shape), EngineConfig(dtype="bfloat16"), 0.05, num_prompts=8, input_len=12) as subject:
        yield subject


class Stubs:
    """The benchmark with `bench_stub` in place of vLLM."""

    def __init__(self, folder: Path, subject: Subject) -> None:
        self.diary, self.out, self.subject = folder / "diary", folder / "out.json", subject

    def bench(self, *variants: Variant, repeats: int = 2) -> dict[str, dict[str, Any]]:
        run.bench(self.subject, SIZE, [("even", variants)], repeats, self.out)
        return self.table()

    def table(self) -> dict[str, dict[str, Any]]:
        return {row["name"].split()[0]: row for row in json.loads(self.out.read_text())}

    def notes(self) -> list[tuple[str, str, float, float]]:
        return [tuple(json.loads(line)) for line in self.diary.read_text().splitlines()]


@pytest.fixture
def stubs(tmp_path: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Stubs:
    stubs = Stubs(tmp_path, subject)
    support = Path(__file__).parents[1] / "support"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(support), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("BENCH_DIARY", str(stubs.diary))
    monkeypatch.setattr(run, "WORKER", "bench_stub")
    monkeypatch.setattr(run, "gpu_bytes", lambda subject, variant, sequences, context: 1)
    return stubs


def named(name: str) -> Variant:
    return Variant(name=name, kind="population", rank=1, population=4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_starts_overlap_on_a_gpu_and_nothing_runs_beside_a_measurement(
    device: plan.Device, stubs: Stubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "device", lambda: device)
    monkeypatch.setattr(run, "_gpu_capacity", lambda: 4 if device == "cuda" else float("inf"))
    table = stubs.bench(named("a speed=50"), named("b"), named("c"))
    notes = stubs.notes()
    starts = [note for note in notes if note[1] == "start"]
    assert len(starts) == len(plan.REFERENCES[device]) + 3  # those that stay are started once
    overlaps = [
        (one, two)
        for i, one in enumerate(notes)
        for two in notes[:i]
        if one[0] != two[0] and max(one[2], two[2]) < min(one[3], two[3])
    ]
    assert bool(overlaps) == (device == "cuda")
    assert all(one[1] == two[1] == "start" for one, two in overlaps)
    assert table["a"]["ratio_to"]["plain, eager"] == [0.5, 0.5, 0.5]
    # On the GPU, which has room for four, each of the three came in a wave of its own.
    assert table["plain,"]["rounds"] == (6 if device == "cuda" else 2)


def test_every_variant_computes_with_the_threads_of_the_engine(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    for threads, got in ((0, "5"), (3, "3")):
        stubs.subject = replace(stubs.subject, engine=replace(stubs.subject.engine, threads=threads))
        table = stubs.bench(named("a"), repeats=1)
        assert {row["threads"] for row in table.values()} == {got}


def test_a_variant_that_fails_is_left_out_and_says_why(stubs: Stubs, capsys: pytest.CaptureFixture[str]) -> None:
    table = stubs.bench(named("a fails=1"), named("b starts=no"), named("c"))
    assert table.keys() == {"plain,", "c"}
    said = " ".join(capsys.readouterr().out.split())
    assert "benchmark: 'a fails=1' ended with status 1: the GPU is lost ; left out" in said
    assert "benchmark: 'b starts=no' ended with status 1: out of memory ; left out" in said


def test_nothing_is_compared_with_a_reference_that_fails(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = Variant(name="plain, eager fails=1", kind="plain")
    monkeypatch.setattr(run, "EAGER", lost)
    monkeypatch.setitem(plan.REFERENCES, run.device(), (lost,))
    with pytest.raises(UserError, match=r"(?s)the GPU is lost.*All others are compared with"):
        stubs.bench(named("a"))


def test_what_was_measured_before_an_interruption_is_shown(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = []
    ask = run.Worker.ask

    def interrupted(self: run.Worker, message: dict[str, Any]) -> dict[str, Any]:
        processes.append(self._process)
        if self.variant.name == "a hangs=2" and message["repeat"] == 2:
            self._send(message)
            raise KeyboardInterrupt
        return ask(self, message)

    monkeypatch.setattr(run.Worker, "ask", interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stubs.bench(named("a hangs=2"), repeats=5)
    assert time.monotonic() - start < 25  # nothing waits for the one that hangs
    assert [row["rounds"] for row in stubs.table().values()] == [2, 1]  # the reference came first in the second
    assert all(process.returncode is not None for process in processes)


def test_a_full_disk_leaves_the_table_before_it(
    stubs: Stubs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The new table is on the terminal."""

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stubs.out.write_text("before")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConfigError, match=rf"^--out {stubs.out}: cannot write \d+ bytes \(No space left on device"):
        stubs.bench(named("a speed=50"))
    assert stubs.out.read_text() == "before"
    assert "0.50 (0.50-0.50)" in capsys.readouterr().out


def test_prefill_and_decode_are_timed_apart() -> None:
    class Slow:
        """Two seconds for the prompts of 5 + 7 tokens, half a second for each further token of both."""

        def run(self, work: Workload, repeat: int) -> Times:
            asked.append(repeat)
            seconds = 2 + 0.5 * (max(work.new_tokens) - 1)
            return Times(sample=seconds, noise=0.1, update=0.2, serve=0.2, noise_in_sample=on_gpu)

        def score(self, work: Workload) -> float:
            return 10.0

        def memory_gib(self) -> float:
            return 3.0

    asked: list[int] = []
    on_gpu = False
    work = Workload(prompts=[[1] * 5, [2] * 7], new_tokens=[9, 9])
    measured = worker.measure(Slow(), work, 3, phased=True)  # type: ignore[arg-type]
    assert measured == {
        "sample_seconds": 6.0,
        "noise_seconds": 0.1,
        "update_seconds": 0.2,
        "serve_seconds": 0.2,
        "tokens_per_second": 5.0,
        "generated_per_second": 3.0,
        "rest_of_step": pytest.approx(0.5 / 6.5),
        "prefill_seconds": 2.0,
        "prefill_tokens_per_second": 6.0,
        "scored_tokens_per_second": 10.0,
        "decode_tokens_per_second": 4.0,
        "decode_step_seconds": 0.5,
        "memory_gib": 3.0,
    }
    assert asked == [6, 7]  # each has noise of its own
    assert "prefill_seconds" not in worker.measure(Slow(), work, 3, phased=False)  # type: ignore[arg-type]
    on_gpu = True
    measured = worker.measure(Slow(), work, 3, phased=False)  # type: ignore[arg-type]
    assert measured["rest_of_step"] == pytest.approx(0.5 / 6.4)


def assert_swapped(runner: Any) -> None:
    """The layers compute with other weights than those of the base model."""
    swapped = runner._llm.model_executor.driver_worker.worker.swapped
    assert len(swapped) == 4 * SHAPE["num_hidden_layers"]  # type: ignore[operator]
    for module, base in swapped:
        x = torch.ones(2, base.shape[1], dtype=base.dtype, device=base.device)
        plain = torch.nn.functional.linear(x, base)
        assert (module.quant_method.apply(module, x) - plain).abs().mean() > 0.1


@pytest.mark.vllm
def test_every_kind_of_variant_runs(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """On random weights, in this process, which spares six starts of Python and vLLM."""
    import eggroll_llm.engine.vllm  # noqa: F401 - its variables come before vLLM
    from eggroll_llm.bench import plain

    temperatures: list[float] = []
    params = plain.sampling_params
    monkeypatch.setattr(plain, "sampling_params", lambda n, t: temperatures.append(t) or params(n, t))
    size = replace(SIZE, temperature=0.5)
    job = run.job_of(subject, size, subject.context(size.output_len), ["even"])
    work = Workload(**job["workloads"]["even"])
    kinds = [EAGER, *(Variant(name=k, kind=k, rank=1, slots=4, population=4) for k in ("population", "stock"))]  # type: ignore[arg-type]
    kinds += [Variant(name=k, kind=k, rank=1, slots=4, population=4) for k in ("files", "swap")]  # type: ignore[arg-type]
    for variant in kinds:
        runner = worker.start({**job, **vars(variant)})
        try:
            answer = worker.measure(runner, work, 0, phased=variant.phased)
            about = runner.about()
            if variant.kind == "swap":
                assert_swapped(runner)
        finally:
            runner.close()
        assert answer["tokens_per_second"] > answer["generated_per_second"] > 0
        assert answer["memory_gib"] > 0.1
        assert (answer["noise_seconds"] is None) == (variant is EAGER)
        assert ("prefill_seconds" in answer) == variant.phased
        assert ("scored_tokens_per_second" in answer) == (variant.kind == "population")
        assert (answer["rest_of_step"] is not None) == (variant.kind in ("population", "stock"))
        assert not about["multiprocess"]
    assert {*temperatures} == {0.5}


@pytest.mark.vllm
@pytest.mark.slow
def test_the_command_measures_vllm_as_it_ships(
    shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = replace(plan.SHIPPED, compiled=False)  # which takes a minute
    monkeypatch.setitem(plan.REFERENCES, "cpu", ())
    monkeypatch.setitem(plan.GROUPS, "cpu", (("even", (shipped,)),))
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)  # an engine of another test has set ours
    out = tmp_path / "bench.json"
    words = ["--random-weights", str(shape), "--num-prompts", "8", "--input-len", "12", "--output-len", "4"]
    words += ["--temperature", "1", "--repeats", "1", "--engine.dtype", "bfloat16", "--out", str(out)]
    assert main(["bench", *words]) == 0
    (row,) = json.loads(out.read_text())
    assert row["multiprocess"]
    assert (row["prompt_tokens"], row["generated_tokens"], row["temperature"]) == (96, 32, 1)
    assert row["tokens_per_second"] * row["prefill_seconds"] > 0
    assert row["memory_gib"] > 0.1
    assert "8 at a time, temperature 1" in capsys.readouterr().out


def test_a_recipe_or_a_shape(tmp_path: Path, shape: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('task = "countdown"\nsteps = 1\n')
    fp8 = tmp_path / "fp8.toml"
    fp8.write_text(f'{ES}[engine]\nquantization = "fp8"\n')
    for words, said in (
        ([], "name a recipe to measure, or give --random-weights SHAPE, but not both"),
        ([str(recipe), "--random-weights", str(shape)], "but not both"),
        ([str(recipe), "--input-len", "8"], "--input-len is of --random-weights"),
        (["--random-weights", "gpt-9"], "neither one of smollm2-135m"),
        (["--random-weights", str(shape), "--es.ranck", "8"], "es.ranck"),
        (["--random-weights", str(shape), "--es.rank", "8"], "es.rank"),  # which would change nothing
        (["--random-weights", str(shape), "--engine.slots", "8"], "--engine.slots is of --ranks and --members"),
        (["--random-weights", str(shape), "--engine.threads", "-1"], "engine.threads = -1: must be at least 0"),
        (["--random-weights", str(shape), "--temperature", "-1"], "--temperature -1: must be at least 0"),
        (["--random-weights", str(shape), "--model", "x"], "takes the directory of a model"),
        (["--random-weights", str(shape), "--input-len", "1"], "must be at least 2"),
        ([str(fp8)], "engine.quantization and engine.tensor_parallel are not measured here"),
    ):
        assert main(["bench", *words]) == 2
        assert said in capsys.readouterr().err


def test_paths_in_flags_are_relative_to_where_the_user_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As those of `train` are; the file is missing there, and not in the recipe's folder."""
    recipe, here = tmp_path / "recipe.toml", tmp_path / "here"
    recipe.write_text(ES.replace("countdown", "gsm8k"))
    here.mkdir()
    monkeypatch.chdir(here)
    assert main(["bench", str(recipe), "--task_options.data_dir", "data"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {here}/data/train.jsonl: there is no such file")


def test_a_file_that_cannot_be_written_is_refused_before_hours_are_spent(
    tmp_path: Path, shape: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, said in (
        (tmp_path, "is a folder: name a file in it"),
        (tmp_path / "no" / "b.json", "the folder"),
    ):
        assert main(["bench", "--random-weights", str(shape), "--out", str(out)]) == 2
        assert capsys.readouterr().err.startswith(f"error: --out {out}: {said}")


def test_a_variant_that_does_not_start_says_why() -> None:
    broken = run.Worker(Variant(name="broken", kind="plain"), {"engine": {"threads": 0}})
    with pytest.raises(UserError, match=r"(?s)'broken' ended with status 1.*KeyError: 'workloads'"):
        broken.answer()
