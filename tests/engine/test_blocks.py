"""The whole population as it runs on a GPU, on Triton's kernels: in the interpreter where there is none.

Members against transformers with dense weights; what follows from it for all kernels is tested in `kernels/`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from next_token import next_token_logprobs
from torch import Tensor
from without_vllm import dense_logprobs

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.interface import Decoding, Request
from eggroll_llm.engine.vllm import blocks, worker
from eggroll_llm.engine.vllm.engine import VllmEngine
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.noise import NoiseSpec, served_factors
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.system.hardware import serves_on_cpu

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not serves_on_cpu(), reason="on a GPU test_engine.py runs on these kernels"),
]

NOISE = NoiseSpec(seed=3, step=1, rank=2, sigma=0.05)
POPULATION, SLOTS = 6, 3
PROMPTS = [(5, 6, 7, 8), (60, 61, 62, 63)]
FITNESS = (1.0, -1.0, 0.5, 0.25, -0.75, 0.0)
UPDATE = UpdateSpec(step=1, noise_step=1, seed=3, rank=2, sigma=0.05, learning_rate=0.02, fitness_M=FITNESS)


MODELS = ["qwen2", "smollm3", "mistral summed", "qwen3 middle"]
few = pytest.mark.parametrize("served", MODELS[:2], indirect=True)
"""For what does not depend on how terms are added."""


@pytest.fixture(scope="module", params=MODELS)
def served(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Iterator[tuple[VllmEngine, Path]]:
    """In fused blocks, but SmolLM3 layer by layer, with activations [1, T, I].

    One adds the terms of o and down as ranks do that have parts of them, before a sum, here of one, and of one only the
    second of three blocks is perturbed.
    """
    kind, _, how = request.param.partition(" ")
    config = EngineConfig(dtype="float32", kv_cache_gib=0.05, slots=SLOTS, max_sequences=8, max_model_len=64)
    model_dir = tiny_model(kind, num_hidden_layers=3) if how == "middle" else tiny_model(kind)
    es = EsSettings(rank=2, layers=(1, 1) if how == "middle" else ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "runs_triton", lambda device: True)
        patch.setattr(blocks, "is_summed", lambda linear: how == "summed")
        engine = VllmEngine(model_dir, config, es, prefix_caching=False)
        yield engine, model_dir
        engine.close()


def dense(model_dir: Path, engine: VllmEngine, member: int | None) -> Tensor:
    """Log-probabilities of a member whose weights are written down."""
    added: dict[str, Any] = {}
    for name, (out, inside) in engine.shapes.items() if member is not None else ():
        A_KOR, B_KIR = served_factors(NOISE, torch.tensor([member // 2]), name, out, inside, torch.float32, "cpu")
        added[name] = (-1) ** member * A_KOR[0] @ B_KIR[0].T
    return dense_logprobs(model_dir, PROMPTS, added)


def test_members_and_the_base_model_share_a_batch(served: tuple[VllmEngine, Path]) -> None:
    """More members than slots, so that they also take each other's place."""
    engine, model_dir = served
    engine.begin(NOISE, POPULATION)
    members = [0, 1, 4, 5, None]
    found = next_token_logprobs(engine, [Request(prompt_ids=p, member=m) for m in members for p in PROMPTS])
    for member, logprobs in zip(members, found.split(len(PROMPTS)), strict=True):
        assert (logprobs - dense(model_dir, engine, member)).abs().max() < 2e-4
    pairs = combinations(found.view(len(members), -1), 2)
    assert min((a - b).abs().max() for a, b in pairs) > 0.02


def test_an_update_is_served_and_members_follow_it(served: tuple[VllmEngine, Path], tmp_path: Path) -> None:
    engine, model_dir = served
    engine.begin(NOISE, POPULATION)
    engine.update(UPDATE)
    engine.export(tmp_path / "model")
    engine.begin(NOISE, POPULATION)
    for member in (None, 3):
        found = next_token_logprobs(engine, [Request(prompt_ids=p, member=member) for p in PROMPTS])
        assert (found - dense(tmp_path / "model", engine, member)).abs().max() < 2e-4
        assert (found - dense(model_dir, engine, member)).abs().max() > 0.02


FUSED = {"rms_norm": 2, "silu_and_mul": 1, "expand": 1, "shrink": 1}
LAUNCHES = {
    "qwen2": {name: 2 * many for name, many in FUSED.items()} | {"rms_norm": 5},
    "smollm3": {"expand": 8, "shrink": 8},
    "mistral summed": {"rms_norm": 5, "silu_and_mul": 2, "expand": 6, "shrink": 2},
    "qwen3 middle": FUSED | {"rms_norm": 3},
}
"""In a forward pass; norms and activation replace vLLM's, the norm behind the last perturbed block too."""


def test_launches_are_those_that_the_documentation_counts(
    served: tuple[VllmEngine, Path], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = served
    counted: Counter[str] = Counter()

    def counting(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any) -> Any:
            counted[name] += 1
            return kernel(*args)

        return count

    for name in FUSED:
        monkeypatch.setattr(blocks, name, counting(name, getattr(blocks, name)))
    engine.begin(NOISE, POPULATION)
    next_token_logprobs(engine, [Request(prompt_ids=PROMPTS[0], member=0)])
    assert counted == LAUNCHES[request.node.callspec.params["served"]]


@pytest.mark.parametrize("served", MODELS[:1], indirect=True)
def test_after_their_noise_was_timed_members_answer_as_before(served: tuple[VllmEngine, Path]) -> None:
    engine, _ = served
    engine.begin(NOISE, POPULATION)
    requests = [Request(prompt_ids=PROMPTS[0], member=member) for member in (0, 3)]
    before = next_token_logprobs(engine, requests)
    assert engine._call("time_noise", POPULATION) > 0
    assert torch.equal(next_token_logprobs(engine, requests), before)


@few
def test_decoding_goes_on_from_what_a_member_wrote(served: tuple[VllmEngine, Path]) -> None:
    """Two tokens at once are the one token after the other, alone."""
    engine, _ = served
    engine.begin(NOISE, POPULATION)
    requests = [Request(prompt_ids=PROMPTS[0], member=m) for m in (0, 1, None)]
    together = engine.generate(requests, Decoding(max_tokens=2, temperature=0.0, ignore_eos=True))
    for request, completion in zip(requests, together, strict=True):
        first, second = completion.token_ids
        longer = Request(prompt_ids=(*request.prompt_ids, first), member=request.member)
        assert int(next_token_logprobs(engine, [longer])[0].argmax()) == second


@few
def test_sampled_completions_depend_on_their_seed_alone(served: tuple[VllmEngine, Path]) -> None:
    """Not on their batch; as likely as the model says is for `test_sampling_triton.py`."""
    engine, _ = served
    engine.begin(NOISE, POPULATION)
    decoding = Decoding(max_tokens=3, temperature=1.0, ignore_eos=True, special_tokens=True)
    requests = [Request(prompt_ids=PROMPTS[0], member=m, seed=s) for m, s in ((None, 7), (None, 8), (2, 7), (None, 7))]
    together = engine.generate(requests, decoding)
    assert together[0].token_ids == together[3].token_ids
    assert len({completion.token_ids for completion in together}) == 3
    assert engine.generate(requests[1:2], decoding)[0].token_ids == together[1].token_ids
    again = engine.generate([*requests[1:], requests[0]], decoding)  # as many, in other rows
    assert [completion.token_ids for completion in again] == [together[i].token_ids for i in (1, 2, 3, 0)]
