"""Our GSM8K is lm-evaluation-harness's: prompts, filters and metric compared with the package itself, on its own code.

The package gets its own task files with the data replaced by local ones, as there is no hub here.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from eggroll_llm.cli.main import main
from eggroll_llm.engine.interface import Completion
from eggroll_llm.records.answers import read_samples
from eggroll_llm.tasks.load import load_task
from eggroll_llm.tasks.prompts import Prompter, text_hash
from eval import lm_eval as ours

HERE = Path(__file__).parent
CASES = [json.loads(line) for line in (HERE.parent / "rewards" / "cases_gsm8k.jsonl").read_text().splitlines()]
REAL = [json.loads(line) for line in (HERE / "real_completions.jsonl").read_text().splitlines()]
NAMES = ("Ann", "Bo", "Cem", "Dora", "Eli")


def row(i: int) -> dict[str, str]:
    gold = f"{1000 + 7 * i:,}" if i % 5 == 0 else f"{-i if i % 7 == 0 else 3 * i + 1}"
    name = NAMES[i % 5]
    return {
        "question": f"{name} had {i} \u201capples\u201d and got {2 * i + 1} more; {{what}} is % left?",
        "answer": f"{name} has {i} + {2 * i + 1} = <<{i}+{2 * i + 1}={3 * i + 1}>>{3 * i + 1}.\n#### {gold}",
    }


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gsm8k")
    for split, numbers in (("train", range(100, 160)), ("test", range(1, 26))):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in numbers))
    return folder


def published(task: str, data: Path) -> dict[str, Any]:
    """The package's own definition of the task, reading local data."""
    import lm_eval

    file = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / f"{task.replace('_', '-')}.yaml"
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    config |= {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(data / f"{split}.jsonl") for split in ("train", "test")}},
    }
    return config


@pytest.fixture(scope="session")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """`reference("gsm8k" | "gsm8k_cot")` -> the package's task."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        from lm_eval.api.task import ConfigurableTask

        if name not in made:
            made[name] = ConfigurableTask(config=published(name, data))
        return made[name]

    return get


def test_the_version_is_the_one_that_is_named(data: Path) -> None:
    import lm_eval

    assert lm_eval.__version__ == re.findall(r"lm-eval ([0-9.]+[0-9])", ours.__doc__ or "")[0]
    for name in ours.TASKS:
        config = published(name, data)
        assert config["metadata"]["version"] == float(ours.VERSION)
        assert config["num_fewshot"] == ours.SHOTS[name]
        assert tuple(config["generation_kwargs"]["until"]) == ours.STOP[name]
        assert config["generation_kwargs"]["do_sample"] is False


@pytest.mark.parametrize(
    ("task", "shots", "chat"),
    [("gsm8k", 5, False), ("gsm8k", 0, True), ("gsm8k", 3, True), ("gsm8k_cot", 8, False), ("gsm8k_cot", 2, True)],
)
def test_prompts(
    task: ours.LmEvalTask,
    shots: int,
    chat: bool,
    reference: Callable[[str], Any],
    data: Path,
    tiny_model: Callable[[str], Path],
) -> None:
    prompter = Prompter(tiny_model("llama"))
    theirs = reference(task)
    theirs.set_config("num_fewshot", shots)
    theirs.set_fewshot_seed(1234)  # what `lm_eval run` does with its default --seed
    theirs.build_all_requests(
        limit=20,
        rank=0,
        world_size=1,
        apply_chat_template=chat,
        fewshot_as_multiturn=True,
        chat_template=lambda messages, add_generation_prompt: prompter.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        ),
        tokenizer_name="tiny",
    )
    wanted = [instance.arguments[0] for instance in theirs.instances]
    loaded = load_task("gsm8k", {"data_dir": str(data)}, base_dir=data)
    found = list(ours.prompts(task, loaded.problems("test")[:20], loaded.problems("train"), shots, chat=chat))
    texts = [prompter.render(prompt) for prompt in found]
    assert texts == wanted
    assert len(set(texts)) == 20
    assert text_hash(texts[0]) == __import__("lm_eval").utils.hash_string(wanted[0])


def verdicts(task: Any, text: str, problem: dict[str, str]) -> dict[str, bool]:
    """What the package says of a completion: its filters, then its metric."""
    from lm_eval.api.instance import Instance

    instance = Instance(request_type="generate_until", doc=problem, arguments=("", {}), idx=0, resps=[text])
    task._instances = [instance]
    task.apply_filters()
    return {
        name: bool(task.process_results(problem, [response])["exact_match"])
        for name, response in instance.filtered_resps.items()
    }


def our_verdicts(task: ours.LmEvalTask, text: str, problem: dict[str, str]) -> dict[str, bool]:
    completion = Completion(text=text, token_ids=(), truncated=False, prompt_tokens=0)
    found = {name: grade(completion, problem).correct for name, grade in ours.graders(task).items()}
    del found["robust"]
    return found


def problem(answer: str, solution: str = "So it is.") -> dict[str, str]:
    return {"question": "?", "answer": f"{solution}\n#### {answer}", "solution": f"{solution}\n#### {answer}"}


def test_an_open_thought_changes_our_grade_and_not_the_published_ones() -> None:
    text = "So it is #### 18\nThe answer is 18. She"
    given = Completion(text=text, token_ids=(), truncated=True, prompt_tokens=0)
    for thought_open in (False, True):
        completion = dataclasses.replace(given, thought_open=thought_open)
        found = {name: grade(completion, problem("18")) for name, grade in ours.graders("gsm8k").items()}
        assert found["robust"].correct != thought_open
        assert found["robust"].answer == (None if thought_open else "18")
        assert found["strict-match"].correct
        assert found["flexible-extract"].correct


OWN = [
    "#### 18", "#### 18.", "#### $18", "####18", "#### -18", "#### 1,018.", "#### 18\n#### 19", "The answer is 18",
    "", "The answer is 18.", "The answer is 18.\n", "The answer is $18.", "The answer is 1,018.0",
    "The answer is -18,", "the answer is 18.", "The answer is 18. The answer is 19.", "The answer is .", "#### .",
    "#### ,", "$", "$$", "-", ".", "18", "8", "-8", "--18", "18-", "1 8", "18$", "$18.00", "18.00", "a18b", "18,",
    "18.", "18..", "1.8.", "\u0661\u0668", "#### \u0661\u0668", "18\r\n", "#### 18\u2028", "18 #### 19 #### 20",
    "[invalid]", "#### [invalid]", "$1,0,1,8", "0x18",
]  # fmt: skip


@pytest.mark.parametrize("task", ours.TASKS)
def test_filters_on_hard_texts(task: ours.LmEvalTask, reference: Callable[[str], Any]) -> None:
    theirs = reference(task)
    differing = [
        (text, gold)
        for text in OWN
        for gold in ("18", "-18", "1,018", "8", "18.0", "0")
        if verdicts(theirs, text, problem(gold)) != our_verdicts(task, text, problem(gold))
    ]
    assert differing == []
    agreed = [our_verdicts(task, text, problem("18")) for text in OWN]
    for name in ("strict-match", "flexible-extract"):  # both verdicts occur, or nothing was compared
        assert {verdict[name] for verdict in agreed} == {True, False}


@pytest.mark.parametrize("task", ours.TASKS)
def test_filters_on_the_graded_cases(task: ours.LmEvalTask, reference: Callable[[str], Any]) -> None:
    assert len(CASES) > 50
    for case in CASES:
        gold = problem(str(case["answer"]))
        assert verdicts(reference(task), case["completion"], gold) == our_verdicts(task, case["completion"], gold)


@pytest.mark.parametrize("task", ours.TASKS)
def test_filters_on_real_completions(task: ours.LmEvalTask, reference: Callable[[str], Any]) -> None:
    """200 answers of the embedded model to GSM8K, and the same with what it did answer as the gold answer."""
    assert len(REAL) == 200
    right = 0
    for sample in REAL:
        for answer in (sample["answer"], re.sub(r"[^0-9]", "", sample["completion"][-6:]) or "0"):
            found = our_verdicts(task, sample["completion"], problem(answer))
            assert found == verdicts(reference(task), sample["completion"], problem(answer))
            right += found["flexible-extract"]
    assert right > 20


@pytest.mark.parametrize("task", ours.TASKS)
@given(
    text=st.lists(st.sampled_from([*"0123456789$.,-# \n", "#### ", "The answer is ", "18"]), max_size=12).map("".join)
)
def test_filters_on_anything(task: ours.LmEvalTask, text: str, reference: Callable[[str], Any]) -> None:
    for gold in ("18", "1,018"):
        assert verdicts(reference(task), text, problem(gold)) == our_verdicts(task, text, problem(gold))


@pytest.fixture(scope="module")
def own_runs(
    embedded_model: Path, tiny_model: Callable[[str], Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What the package was given on vLLM, by the kind of model, and under `out` what came of it."""
    folder = tmp_path_factory.mktemp("theirs")
    tiny = other_end_of_text(tiny_model("llama"), folder / "model")
    jobs: dict[str, dict[str, Any]] = {
        "embedded": {"model": str(embedded_model), "shots": 5, "limit": 3, "context": 2048},
        "other end of text": {"model": str(tiny), "shots": 0, "limit": 16, "context": 512},
    }
    for kind, job in jobs.items():
        job |= {"config": published("gsm8k", data) | {"num_fewshot": job["shots"]}, "out": str(folder / kind)}
    command = [sys.executable, str(HERE / "run_lm_eval.py"), json.dumps([*jobs.values()])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    return jobs


@pytest.mark.model
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["embedded", "other end of text"])
def test_its_own_run_on_vllm_gives_the_same_answers(
    kind: str, own_runs: dict[str, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    """In float32, where no near tie is decided by rounding: same prompts, same text, same figures.

    The tiny model writes special tokens all the time, and <|im_end|>, a stop string, is not its end of text.
    """
    job = own_runs[kind]
    shots, limit = job["shots"], job["limit"]
    words = f"--task gsm8k --num-fewshot {shots} --limit {limit} --engine.dtype float32 --engine.kv_cache_gib 0.25"
    words += f" --data-dir {data} --out {tmp_path / 'ours.json'}"
    assert main(["eval", job["model"], *words.split()]) == 0
    wanted = json.loads(Path(job["out"]).read_text())
    found = read_samples(tmp_path / "ours.samples.jsonl")[1]
    assert len(found) == limit
    by_id = {(sample["doc_id"], sample["filter"]): sample for sample in wanted["samples"]["gsm8k"]}
    for sample in found:
        theirs = by_id[sample.problem, "strict-match"]
        assert sample.prompt_hash == theirs["prompt_hash"]
        assert sample.completion == theirs["resps"][0][0]
        for name in ("strict-match", "flexible-extract"):
            assert sample.scores[name].correct == bool(by_id[sample.problem, name]["exact_match"])
    if kind != "embedded":
        assert any("<|" in sample.completion for sample in found)
        assert any(sample.tokens < 256 for sample in found)
    figures = json.loads((tmp_path / "ours.json").read_text())["results"]["gsm8k"]
    for key in ("strict-match", "flexible-extract"):
        assert figures[f"exact_match,{key}"] == pytest.approx(wanted["results"]["gsm8k"][f"exact_match,{key}"])


def other_end_of_text(model: Path, copy: Path) -> Path:
    """The same model with <|endoftext|> in place of <|im_end|> as the token that ends a text."""
    from transformers import AutoTokenizer

    shutil.copytree(model, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(copy)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((copy / name).read_text())
        settings["eos_token_id"] = tokenizer.eos_token_id
        (copy / name).write_text(json.dumps(settings))
    return copy
