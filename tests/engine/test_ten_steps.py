"""`eggroll-llm train` on a model whose activations have a batch dimension: it learns, and exports what it served."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from next_token import next_token_logprobs
from safetensors.torch import load_file
from torch import Tensor
from without_vllm import dense_logprobs

from eggroll_llm.cli.main import main
from eggroll_llm.engine.interface import Request
from eggroll_llm.engine.vllm.engine import VllmEngine
from eggroll_llm.system.jsonl import read_rows

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPTS = tuple(tuple((7 * i + j) % 300 + 3 for j in range(40)) for i in range(3))
TASK = """
class Letters:
    def problems(self, split):
        return [{"number": n + (40 if split == "test" else 0)} for n in range(32)]
    def prompt(self, problem):
        return f"Question: how many are left of {problem['number']}? Answer:"
    def score(self, completion, problem):
        return sum(character in "aeiouAEIOU" for character in completion) / max(1, len(completion))
"""
RECIPE = """
model = "{model}"
task = "letters.py:Letters"
steps = 10
sampling = {{ prompts_per_step = 4, max_tokens = 16 }}
es = {{ population = 16, sigma = 0.03, learning_rate = 0.03, rank = 2 }}
engine = {{ dtype = "float32", kv_cache_gib = 0.05, max_sequences = 64 }}
eval = {{ every = 0, problems = 16 }}
checkpoint = {{ every = 0, best = false }}
"""


def test_ten_steps_raise_the_reward_and_the_export_is_what_was_served(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of the engine just before it is closed = those of transformers with `final/`."""
    served: list[Tensor] = []
    close = VllmEngine.close

    def look_and_close(engine: VllmEngine) -> None:
        served.append(next_token_logprobs(engine, [Request(prompt_ids=prompt) for prompt in PROMPTS]))
        close(engine)

    monkeypatch.setattr(VllmEngine, "close", look_and_close)
    (tmp_path / "letters.py").write_text(TASK)
    recipe = tmp_path / "recipe.toml"
    model = tiny_model("smollm3")
    recipe.write_text(RECIPE.format(model=model))
    assert main(["train", str(recipe), "--run-dir", str(tmp_path / "run")]) == 0
    metrics = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(11))
    assert metrics[10]["eval/reward"] > metrics[0]["eval/reward"] + 0.1

    final = tmp_path / "run" / "final"
    assert (served[0] - dense_logprobs(final, PROMPTS)).abs().max() < 2e-4
    assert (served[0] - dense_logprobs(model, PROMPTS)).abs().max() > 0.1
    base, trained = (load_file(directory / "model.safetensors") for directory in (model, final))
    changed = {name for name in base if not torch.equal(base[name].float(), trained[name])}
    assert changed == {name for name in base if name.endswith("proj.weight")}
