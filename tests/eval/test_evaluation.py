"""What is asked and how, and that an interrupted evaluation comes to the samples of one that was not."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from eggroll_llm.cli.main import main
from eggroll_llm.config.schema import EngineConfig, EvalConfig, RunConfig, SamplingConfig
from eggroll_llm.engine.interface import Completion, Decoding, Request
from eggroll_llm.errors import ConfigError, SamplesError, TaskError
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.records.answers import read_samples
from eval import evaluation, lm_eval
from eval.evaluation import Settings, evaluate_subject, questions_for, settings_for
from eval.subject import Subject
from eval.summary import summarize, table

ROOT = Path(__file__).parents[2]
CONFIG = RunConfig(
    task="gsm8k",
    task_options={"data_dir": "/data", "grader": "strict"},
    steps=1,
    sampling=SamplingConfig(max_tokens=99),
    es=EsSettings(population=4, sigma=0.01, learning_rate=0.01),
    engine=EngineConfig(dtype="float32", kv_cache_gib=0.25, max_model_len=64),
)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gsm8k")
    for split in ("train", "test"):
        rows = [{"question": f"{split}: {i} and {i}?", "answer": f"Sum.\n#### {2 * i}"} for i in range(12)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def decide(config: RunConfig | None, flags: Sequence[tuple[str, str]] = (), **how: Any) -> Settings:
    return settings_for(Subject(name="it", model_dir=Path("/model"), config=config), flags, **how)


def test_a_run_is_asked_what_it_was_trained_on() -> None:
    settings = decide(CONFIG)
    assert (settings.task, settings.protocol, settings.sampling.max_tokens) == ("gsm8k", "task", 99)
    assert settings.task_options == {"data_dir": "/data", "grader": "strict"}
    assert settings.engine == dataclasses.replace(CONFIG.engine, max_model_len=0)
    assert decide(dataclasses.replace(CONFIG, eval=EvalConfig(max_tokens=150))).sampling.max_tokens == 150
    assert decide(CONFIG, max_tokens=7).sampling.max_tokens == 7


def test_a_run_is_asked_as_its_own_evaluations_ask() -> None:
    """Flags go before it, and another task or protocol has none of it."""
    sampling = SamplingConfig(
        repetition_penalty=1.2, stop=("###",), top_p=0.5, temperature=0.5, thinking_token_budget=9
    )
    run = dataclasses.replace(CONFIG, sampling=sampling)

    def asked(**how: Any) -> tuple[Any, ...]:
        sampling = decide(run, **how).sampling
        assert (sampling.top_p, sampling.temperature) == (1.0, 0.0)
        return sampling.repetition_penalty, sampling.stop, sampling.thinking_token_budget

    assert asked() == (1.2, ("###",), 9)
    assert asked(repetition_penalty=None, stop=None) == asked()
    assert asked(repetition_penalty=1.0, stop=("Q:",), thinking_token_budget=0) == (1.0, ("Q:",), 0)
    assert asked(task="gsm8k") == asked(task="countdown") == (1.0, (), 0)


def test_flags_of_sampling_are_in_the_result(
    data: Path, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in its table; without them it is named as before there were such flags."""
    parrots: list[Parrot] = []

    def start(*_: Any, **__: Any) -> Parrot:
        parrots.append(Parrot(breaks_after=99))
        return parrots[-1]

    monkeypatch.setattr(evaluation, "start_engine", start)
    command = f"eval {tiny_model('llama')} --task gsm8k --data-dir {data} --num-fewshot 0 --limit 2 --temperature 1"
    flags = "--top-k 5 --min-p 0.1 --repetition-penalty 1.2 --stop Aha --stop Q:"
    facts = []
    for name, more in (("plain", ""), ("set", flags)):
        out = tmp_path / f"{name}.json"
        assert main([*command.split(), "--out", str(out), *more.split()]) == 0
        facts.append(json.loads(out.read_text())["config"])
    new = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    stop = (*lm_eval.STOP["gsm8k"], "Aha", "Q:")
    assert parrots[-1].decoding == Decoding(max_tokens=256, temperature=1.0, stop=stop, special_tokens=True, **new)
    assert facts[1] == facts[0] | new | {"stop": list(stop)}
    assert not facts[0].keys() & new.keys()


def test_gsm8k_by_name_is_lm_evals() -> None:
    """With the run's data, and nothing else of how it was trained."""
    for task in lm_eval.TASKS:
        settings = decide(CONFIG, task=task)
        assert (settings.task, settings.protocol, settings.sampling.max_tokens) == (task, "lm-eval", 256)
        assert settings.task_options == {"data_dir": "/data"}
    assert decide(None, task="gsm8k").task_options == {}
    assert decide(CONFIG, task="gsm8k", protocol="task") == decide(CONFIG)
    assert decide(None, task="gsm8k", protocol="task").protocol == "task"


def test_flags_go_before_the_run() -> None:
    flags = [("task_options.grader", "flexible"), ("--engine.kv_cache_gib", "2"), ("task_options.data_dir", "/other")]
    settings = decide(CONFIG, flags, limit=10)
    assert settings.task_options == {"data_dir": "/other", "grader": "flexible"}
    assert (settings.engine.kv_cache_gib, settings.engine.dtype, settings.limit) == (2.0, "float32", 10)


def test_a_recipe_asks_any_model() -> None:
    for config in (None, dataclasses.replace(CONFIG, task="countdown")):
        subject = Subject(name="it", model_dir=Path("/model"), config=config)
        assert decide(config, recipe=CONFIG) == dataclasses.replace(decide(CONFIG), subject=subject)


def test_a_step_is_chosen_on_the_problems_of_its_run_whoever_names_them() -> None:
    chosen = Subject(name="it", model_dir=Path("/model"), config=CONFIG, selected_on=256)
    assert settings_for(chosen, [], recipe=dataclasses.replace(CONFIG, steps=9)).subject.selected_on == 256
    others = dataclasses.replace(CONFIG, task_options={"data_dir": "/others"})
    assert settings_for(chosen, [], recipe=others).subject.selected_on == 0
    for flag, text, selected_on in (("data_dir", "/others", 0), ("data_dir", "/data", 256), ("grader", "robust", 256)):
        assert settings_for(chosen, [(f"--task_options.{flag}", text)]).subject.selected_on == selected_on


def test_another_task_takes_the_engine_alone() -> None:
    settings = decide(CONFIG, task="countdown")
    chosen = dataclasses.replace(Subject(name="it", model_dir=Path("/model"), config=CONFIG), selected_on=256)
    assert settings_for(chosen, [], task="countdown").subject.selected_on == 0
    assert settings_for(chosen, []).subject.selected_on == 256
    assert (settings.task, settings.task_options, settings.sampling.max_tokens) == ("countdown", {}, 320)
    assert settings.engine.dtype == "float32"


@pytest.mark.parametrize(
    ("how", "flags", "said"),
    [
        ({}, [], "it: which task? Add --recipe RECIPE.toml, or --task gsm8k, countdown, dataset, verifiers or file.py"),
        ({"task": "gsm8k"}, [("es.sigma", "1")], "unknown flag --es.sigma"),
        ({"task": "gsm8k"}, [("--engine.threads", "-1")], "--engine.threads: engine.threads = -1: must be at least 0"),
        ({"task": "gsm8k"}, [("engine.kv_cache", "1")], "Did you mean --engine.kv_cache_gib"),
        ({"task": "gsm8k"}, [("engine.slots", "x")], "--engine.slots x: an integer is expected"),
        ({"task": "countdown", "protocol": "lm-eval"}, [], "only gsm8k and gsm8k_cot have it, not countdown"),
        ({"task": "countdown", "apply_chat_template": True}, [], "belong to --protocol lm-eval"),
        ({"task": "countdown", "shots": 0}, [], "belong to --protocol lm-eval"),
        ({"task": "gsm8k", "samples": 0}, [], "--samples 0: must be at least 1"),
        ({"task": "gsm8k", "limit": -1}, [], "--limit -1: must be at least 0"),
        ({"task": "gsm8k", "stop": "Q:"}, [], 'sampling.stop = "Q:" is a string, but an array is expected'),
        ({"task": "gsm8k", "samples": 4}, [], "--samples 4: greedy decoding gives the same answer"),
        ({"task": "gsm8k", "temperature": -1.0}, [], "--temperature: sampling.temperature = -1.0: must be at least 0"),
        ({"task": "gsm8k", "temperature": float("nan")}, [], "--temperature: sampling.temperature = nan is not finite"),
        ({"task": "gsm8k", "top_p": 0.0}, [], "--top-p: sampling.top_p = 0.0: must be above 0"),
        ({"task": "gsm8k", "top_k": 5}, [], "--top-k: sampling.top_k = 5, sampling.temperature = 0.0: greedy decoding"),
        ({"task": "gsm8k", "repetition_penalty": 0.0}, [], "--repetition-penalty: sampling.repetition_penalty = 0.0"),
        ({"task": "countdown", "thinking_token_budget": 400}, [], "= 320: leaves no room for an answer"),
        ({"task": "gsm8k", "stop": ("",)}, [], '--stop: sampling.stop = [""]: every completion would end at'),
    ],
)
def test_what_is_refused(how: dict[str, Any], flags: list[tuple[str, str]], said: str) -> None:
    with pytest.raises(ConfigError) as info:
        decide(None, flags, **how)
    assert said in str(info.value)


def test_questions(data: Path) -> None:
    options = [("task_options.data_dir", str(data))]
    asked = questions_for(decide(None, options, task="gsm8k", limit=4), data)
    assert (asked.version, asked.shots, asked.metric) == ("3", 5, "exact_match")
    assert (len(asked.problems), asked.available, len(asked.prompts)) == (4, 12, 4)
    assert list(asked.graders) == ["strict-match", "flexible-extract", "robust"]
    own = questions_for(decide(None, options, task="gsm8k", protocol="task"), data)
    assert (own.shots, own.metric, len(own.problems)) == (None, "accuracy", 12)
    assert list(own.graders) == ["strict-match", "flexible-extract", "robust", "task"]
    with pytest.raises(ConfigError, match=r"task_options\.seed: lm-eval's protocol does not have this option"):
        questions_for(decide(None, [*options, ("task_options.seed", "1")], task="gsm8k"), data)
    with pytest.raises(ConfigError, match="--num-fewshot 9: gsm8k_cot has 8 worked examples"):
        questions_for(decide(None, options, task="gsm8k_cot", shots=9), data)


class Parrot:
    """Answers as the seed says, last requests first, and breaks after some answers."""

    def __init__(self, breaks_after: int) -> None:
        self.breaks_after, self.closed, self.asked = breaks_after, False, 0

    def stream(self, requests: Sequence[Request], decoding: Decoding) -> Generator[tuple[int, Completion], None, None]:
        self.asked, self.decoding = len(requests), decoding
        for count, i in enumerate(reversed(range(len(requests)))):
            if count == self.breaks_after:
                raise KeyboardInterrupt
            seed = requests[i].seed or 0
            text = f" #### {2 * (seed % 12)}"
            yield i, Completion(text=text, token_ids=(1,) * (seed % 7), truncated=seed % 3 == 0, prompt_tokens=5)

    def close(self) -> None:
        self.closed = True


def test_interrupted_anywhere_it_comes_to_the_same(
    data: Path, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject(name="it", model_dir=tiny_model("llama"), config=None)
    options = [("task_options.data_dir", str(data))]
    how = {"task": "gsm8k", "limit": 5, "samples": 4, "temperature": 1.0, "shots": 0}
    settings = settings_for(subject, options, **how)
    parrots: list[Parrot] = []

    def run(path: Path | None, breaks_after: int, **changes: Any) -> str:
        parrots.append(Parrot(breaks_after))
        monkeypatch.setattr(evaluation, "start_engine", lambda *_, **__: parrots[-1])
        changed = dataclasses.replace(settings, **changes)
        results = evaluate_subject(changed, data, path)
        assert [(s.problem, s.sample) for s in results.samples] == [(p, s) for p in range(5) for s in range(4)]
        return table(summarize(results, [2, 4]))

    whole = run(None, 99)
    assert parrots[-1].closed
    assert "LIMITED to 5 of 12" in whole
    path = tmp_path / "samples.jsonl"
    left = 20
    for step in (1, 7, 5, 0, 6):
        with pytest.raises(KeyboardInterrupt):
            run(path, step)
        assert (parrots[-1].asked, parrots[-1].closed) == (left, True)
        left -= step
    assert run(path, 99) == whole
    assert parrots[-1].asked == left == 1
    assert run(path, 0) == whole  # complete: no engine is started
    assert parrots[-1].asked == 0
    assert len(path.read_text().splitlines()) == 21
    other = [
        {"sampling": dataclasses.replace(settings.sampling, **change)}
        for change in ({"temperature": 0.5}, {"min_p": 0.1})
    ]
    for change in (*other, {"seed": 1}, {"limit": 6}, {"apply_chat_template": True}):
        with pytest.raises(SamplesError, match="belongs to another evaluation"):
            run(path, 99, **change)
    with pytest.raises(SamplesError, match="belongs to another evaluation"):
        run(path, 99, engine=dataclasses.replace(settings.engine, quantization="fp8"))
    assert run(None, 99, seed=1) != whole


def test_grades_are_those_of_todays_grader_and_gold(
    data: Path, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gold answer is corrected after half of the completions: all are graded by the new one, none is asked again."""
    folder = shutil.copytree(data, tmp_path / "data")
    subject = Subject(name="it", model_dir=tiny_model("llama"), config=None)
    settings = settings_for(subject, [("task_options.data_dir", str(folder))], task="gsm8k", limit=4, shots=0)
    parrot = Parrot(breaks_after=99)
    monkeypatch.setattr(evaluation, "start_engine", lambda *_, **__: parrot)
    path = tmp_path / "samples.jsonl"
    answers = [s.scores["robust"].answer for s in evaluate_subject(settings, folder, path).samples]
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    rows[2]["answer"] = f"Corrected.\n#### {answers[2]}"
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parrot.asked = 0
    again = evaluate_subject(settings, folder, path).samples
    assert parrot.asked == 0
    assert again[2].scores["robust"].correct
    assert sorted(read_samples(path)[1], key=lambda sample: sample.problem) == list(again)


def test_grades_that_need_tokens_are_kept(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are not stored, so a grade by them cannot be given again."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n{"prompt": "d"}\n')
    (tmp_path / "length.py").write_text("def length(completion_ids, **_): return [len(i) for i in completion_ids]\n")
    subject = Subject(name="it", model_dir=tiny_model("llama"), config=None)
    options = {"dataset": str(tmp_path / "rows.jsonl"), "rewards": [f"{tmp_path / 'length.py'}:length"]}
    options["test_share"] = 0.5
    settings = decide(None, task="dataset", temperature=1.0, samples=3)
    settings = dataclasses.replace(settings, subject=subject, task_options=options)
    monkeypatch.setattr(evaluation, "start_engine", lambda *_, **__: Parrot(breaks_after=99))
    first, second = (evaluate_subject(settings, tmp_path, tmp_path / "out.jsonl").samples for _ in range(2))
    rewards = [sample.scores["task"].reward for sample in first]
    assert rewards == [sample.tokens for sample in first]
    assert any(rewards)
    assert second == first


def test_a_grader_that_always_fails_ends_it_with_its_traceback(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "class Mine:\n"
        "    def problems(self, split): return [{'n': 1}, {'n': 2}]\n"
        "    def prompt(self, problem): return 'say it'\n"
        "    def score(self, completion, problem): return problem['missing']\n"
    )
    subject = Subject(name="it", model_dir=tiny_model("llama"), config=None)
    monkeypatch.setattr(evaluation, "start_engine", lambda *_, **__: Parrot(breaks_after=99))
    with pytest.raises(TaskError, match=r"score\(\) failed on all 2 completions; the first failure") as info:
        evaluate_subject(settings_for(subject, [], task="mine.py:Mine"), tmp_path)
    assert "KeyError: 'missing'" in str(info.value)


def test_a_grader_that_exits_costs_its_own_answers(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "class Mine:\n"
        "    def problems(self, split): return [{'n': n} for n in range(3)]\n"
        "    def prompt(self, problem): return 'say it'\n"
        "    def answer(self, completion): return completion.strip()\n"
        "    def score(self, completion, problem): return 1.0 if problem['n'] != 1 else os._exit(7)\n"
    )
    subject = Subject(name="it", model_dir=tiny_model("llama"), config=None)
    monkeypatch.setattr(evaluation, "start_engine", lambda *_, **__: Parrot(breaks_after=99))
    settings = settings_for(subject, [("reward.timeout_seconds", "30")], task="mine.py:Mine")
    assert settings.reward.timeout_seconds == 30
    path, said = tmp_path / "samples.jsonl", list[str]()
    for _ in range(2):  # the second time from the file, and graded again
        found = evaluate_subject(settings, tmp_path, path, say=said.append).samples
        assert [sample.scores["task"].reward for sample in found] == [1, 0, 1]
        assert [sample.scores["task"].answer is None for sample in found] == [False, True, False]
    assert len(said) == 2
    assert "score() ended its process with status 7; problem test-2, answer" in said[0]


@pytest.mark.vllm
@pytest.mark.slow
def test_killed_and_started_again(
    data: Path, tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL in the middle of sampling: the same samples and the same table, at temperature 1."""

    def words(out: Path) -> list[str]:
        return (
            f"eval {tiny_model('llama')} --task gsm8k --data-dir {data} --num-fewshot 2 --samples 4 --temperature 1 "
            f"--k 2,4 --max-tokens 24 --engine.max_sequences 4 --engine.kv_cache_gib 0.25 --out {out}"
        ).split()

    def lines(file: Path) -> int:
        return file.read_bytes().count(b"\n") if file.exists() else 0

    whole, path = tmp_path / "whole.json", tmp_path / "killed.json"
    samples = path.with_suffix(".samples.jsonl")
    command = [sys.executable, "-m", "eggroll_llm", *words(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while lines(samples) < 6 and process.poll() is None:
            time.sleep(0.005)
        process.kill()
    assert 6 <= lines(samples) < 49
    tables = []
    for out in (whole, path):
        assert main(words(out)) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    assert "maj@4" in tables[0]
    assert path.read_text() == whole.read_text()
    assert sorted(samples.read_text().splitlines()) == sorted(
        whole.with_suffix(".samples.jsonl").read_text().splitlines()
    )
