"""The documents: links between files lead somewhere, and the page that is generated is up to date."""

import ast
import re
import runpy
import tomllib
from pathlib import Path

import pytest
from dataset_files import write
from scored import score

from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.engine.interface import Completion
from eggroll_llm.tasks.load import load_task
from eggroll_llm.training.scorer import Scorer

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path for folder in (".", "docs", "recipes", "tests", ".github") for path in (ROOT / folder).glob("*.md")
)
LINK = re.compile(r"\[[^\]\[]*\]\(([^)\s]+)\)|(?:href|src)=\"([^\"]+)\"")
CODE = re.compile(r"^```.*?^```$|^    [^\n]*$", flags=re.MULTILINE | re.DOTALL)


def prose(document: Path) -> str:
    """Return the text of a Markdown file without its blocks of code."""
    return CODE.sub("", document.read_text(encoding="utf-8"))


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.+)$", prose(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    """Return the links of a Markdown file to files or headings that are not there."""
    broken = []
    for link in (a or b for a, b in LINK.findall(prose(document))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path) if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document) == []


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[a](none.md) [b](#a-heading) [c](#none) [d](https://a.b) [e](page.md#no)", "utf-8")
    assert broken_links(page) == ["none.md", "#none", "page.md#no"]


def test_the_configuration_page_is_up_to_date() -> None:
    """`make docs` writes it again."""
    script = runpy.run_path(str(ROOT / "scripts" / "configuration_page.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["page"]()


def test_the_table_of_memory_is_up_to_date() -> None:
    """`python scripts/memory_table.py` prints it."""
    script = runpy.run_path(str(ROOT / "scripts" / "memory_table.py"))
    assert script["table"]() in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def blocks(name: str, kind: str) -> list[str]:
    return [text for found, text in BLOCK.findall((ROOT / "docs" / name).read_text(encoding="utf-8")) if found == kind]


def test_the_job_of_trl_is_loaded_from_its_own_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data are written, both recipes load them, and the rewards score; TRL's block is only read."""
    monkeypatch.chdir(tmp_path)
    data, rewards, trl = blocks("coming_from_trl.md", "python")
    es, grpo = blocks("coming_from_trl.md", "toml")
    exec(compile(data, "data.py", "exec"), {})
    (tmp_path / "my_rewards.py").write_text(rewards)
    sampling, evaluation = es.index("[sampling]"), es.index("[eval]")
    method, rest = grpo.split("[sampling]")
    changed = f"{method}{es[:sampling]}[sampling]{rest}{es[evaluation:]}"
    for number, text in enumerate((es, changed)):
        (tmp_path / f"{number}.toml").write_text(text)
        config = load_recipe(tmp_path / f"{number}.toml")
        assert config.method == ("es", "grpo")[number]
        task = load_task(config.task, config.task_options, base_dir=tmp_path)
        assert (len(task.problems("train")), len(task.problems("test"))) == (180, 20)
        problem = task.problems("train")[0]
        completion = Completion(text=problem["answer"], token_ids=(1,), truncated=False, prompt_tokens=1)
        with Scorer(task) as scorer:
            assert score(scorer, completion, problem).parts == {"right": 1.0, "brief": 1 / 3}
    used = {node.arg for node in ast.walk(ast.parse(trl)) if isinstance(node, ast.keyword)}
    config_of_trl = pytest.importorskip("trl").GRPOConfig
    known = {*config_of_trl.__dataclass_fields__, "model", "reward_funcs", "train_dataset", "eval_dataset", "args"}
    assert used - known == {"data_files", "split", "seed"} - known


def test_the_recipe_for_data_of_your_own_loads(tmp_path: Path) -> None:
    recipe, options = blocks("your_own_data.md", "toml")
    (rewards,) = blocks("your_own_data.md", "python")
    (tmp_path / "my_rewards.py").write_text(rewards)
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(20)]
    write(tmp_path / "sums.jsonl", rows)
    (tmp_path / "sums.toml").write_text(recipe)
    config = load_recipe(tmp_path / "sums.toml")
    assert len(load_task(config.task, config.task_options, base_dir=tmp_path).problems("train")) == 18
    both = {**config.task_options, **tomllib.loads(options)["task_options"]}
    task = load_task(config.task, both, base_dir=tmp_path)
    assert "1 × my_rewards.py:right + 0.2 × my_rewards.py:brief" in task.notes[0]


def test_the_readme_fits_on_a_few_screens() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    assert len(text.encode()) <= 9_000
