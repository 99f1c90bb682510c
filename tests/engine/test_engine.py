"""What vLLM serves, against transformers with the same weights written down densely: tiny models, all architectures.

For a member: logits(vLLM, member m) = logits(transformers, W + sign sigma E), E from the factors regenerated here.
After an update: logits(vLLM, base) = logits(transformers, exported directory). In float32 the tolerance
is tight; in bfloat16, where transformers computes in float32 what vLLM rounds at every layer, it is not.
"""

import operator
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS, MIXTURES
from next_token import next_token_logprobs
from safetensors.torch import load_file, save_file
from torch import Tensor
from without_vllm import dense_logprobs, dense_scores

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.interface import Decoding, Request
from eggroll_llm.engine.sampling import sample_population
from eggroll_llm.engine.vllm import slots as members
from eggroll_llm.engine.vllm.engine import VllmEngine
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.noise import NoiseSpec, served_factors
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.system.hardware import serves_on_cpu

pytestmark = pytest.mark.vllm

SIGMA, POPULATION, SLOTS = 0.05, 6, 4
PROMPTS = tuple(tuple((7 * i + j) % 300 + 3 for j in range(40)) for i in range(3))
GREEDY = Decoding(max_tokens=8)


@dataclass(frozen=True, kw_only=True)
class Case:
    kind: str
    rank: int
    dtype: Any = "float32"
    tolerance: float = 2e-4
    """Largest difference of log-probabilities between vLLM and transformers with the same weights."""
    apart: float = 2e-2
    """Least difference between different members."""
    compiled: bool = False
    masters: Any = "float32"
    offload: bool = False
    layers: tuple[int, ...] = ()
    """es.layers, of a model with three."""

    def __str__(self) -> str:
        extras = "-compiled" * self.compiled + "-offload" * self.offload + "-layers" * bool(self.layers)
        return f"{self.kind}-{self.dtype}-{self.rank}{extras}{f'-{self.masters}' * (self.masters != 'float32')}"


CPU_CASES = [  # the first three, and five, are those of `few` and `some`
    Case(kind="llama", rank=1),
    Case(kind="qwen3", rank=1, dtype="bfloat16", tolerance=0.2, apart=0.6, masters="split"),
    Case(kind="qwen2", rank=1, dtype="bfloat16", tolerance=0.2, apart=0.6, compiled=True),
    Case(kind="gemma3", rank=3),
    Case(kind="qwen3moe", rank=2),
    Case(kind="qwen3", rank=4),
    Case(kind="qwen2", rank=16),
    Case(kind="smollm3", rank=1),
    Case(kind="olmo2", rank=2),
    Case(kind="olmo3", rank=1),
    Case(kind="mistral", rank=8),
    Case(kind="phi3", rank=2),
    Case(kind="granite", rank=1),
    Case(kind="olmoe", rank=1, layers=(1, 2)),
    Case(kind="qwen3moe", rank=1, dtype="bfloat16", tolerance=0.2, apart=0.6),
    Case(kind="mistral", rank=2, layers=(1, 1)),
]
CUDA_CASES = [  # FlashAttention serves no float32
    Case(kind=kind, rank=rank, dtype="bfloat16", tolerance=0.2, apart=0.6, masters=masters, offload=offload)
    for kind, rank, masters, offload in (
        ("llama", 1, "float32", False),
        ("qwen2", 3, "split", False),
        ("qwen3", 16, "split", True),
        ("granite", 1, "float32", True),
        ("smollm3", 1, "float32", False),
        ("gemma3", 2, "float32", False),
    )
] + [Case(kind="mistral", rank=1, dtype="bfloat16", tolerance=0.2, apart=0.2, layers=(1, 1))]
assert {case.kind for case in CPU_CASES} == KINDS.keys(), "every architecture that can be trained is served here"
CASES = CPU_CASES if serves_on_cpu() else CUDA_CASES
few = pytest.mark.parametrize("served", CASES[:3], indirect=True, ids=str)
"""For what no architecture can change."""
some = pytest.mark.parametrize("served", CASES[:5], indirect=True, ids=str)
"""For what depends on the batch."""


@dataclass
class Served:
    engine: VllmEngine
    model_dir: Path
    case: Case

    def noise(self, step: int = 1) -> NoiseSpec:
        return NoiseSpec(seed=3, step=step, rank=self.case.rank, sigma=SIGMA)

    def update(self) -> UpdateSpec:
        return UpdateSpec(
            step=1,
            noise_step=1,
            seed=3,
            rank=self.case.rank,
            sigma=SIGMA,
            learning_rate=0.02,
            fitness_M=(1.0, -1.0, 0.5, 0.25, -0.75, 0.0),
        )


def small_cache() -> dict[str, Any]:
    """Of a GPU the share that vLLM takes would be a million blocks of these models, each an object."""
    return {} if serves_on_cpu() else {"kv_cache_memory_bytes": 2**26}


@pytest.fixture(scope="module", params=CASES, ids=str)
def served(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Iterator[Served]:
    case: Case = request.param
    config = EngineConfig(
        dtype=case.dtype,
        kv_cache_gib=0.05,
        gpu_memory_utilization=0.1,
        slots=SLOTS,
        max_sequences=16,
        max_model_len=128,
        compile=case.compiled,
        offload_masters=case.offload,
    )
    model_dir = tiny_model(case.kind, num_hidden_layers=3) if case.layers else tiny_model(case.kind)
    es = EsSettings(rank=case.rank, masters=case.masters, layers=case.layers)
    engine = VllmEngine(model_dir, config, es, vllm_args=small_cache())
    start = {name: tensor.clone() for name, tensor in engine.state().items()}
    yield Served(engine, model_dir, case)
    engine.load_state(start)
    engine.close()


@pytest.fixture(autouse=True)
def fresh_weights(served: Served) -> Iterator[None]:
    before = {name: tensor.clone() for name, tensor in served.engine.state().items()}
    yield
    served.engine.load_state(before)


def perturbation(engine: VllmEngine, spec: NoiseSpec, member: int) -> dict[str, Tensor]:
    """sign sigma E of every trained parameter, dense, from the factors as rounded to the served dtype."""
    sign = -1.0 if member % 2 else 1.0
    dense = {}
    for name, (out, inside) in engine.shapes.items():
        A_KOR, B_KIR = served_factors(spec, torch.tensor([member // 2]), name, out, inside, engine.dtype, "cpu")
        dense[name] = sign * A_KOR[0].float() @ B_KIR[0].float().T
    return dense


def transformers_logprobs(model_dir: Path, added: dict[str, Tensor] | None = None) -> Tensor:
    return dense_logprobs(model_dir, PROMPTS, added)


def served_logprobs(engine: VllmEngine, members: list[int | None]) -> Tensor:
    """[members, prompts, vocabulary], all in one batch."""
    requests = [Request(prompt_ids=prompt, member=member) for member in members for prompt in PROMPTS]
    return next_token_logprobs(engine, requests).view(len(members), len(PROMPTS), -1)


def test_a_member_is_the_dense_model_and_no_other(served: Served) -> None:
    engine = served.engine
    engine.begin(served.noise(), POPULATION)
    dense = {m: transformers_logprobs(served.model_dir, perturbation(engine, served.noise(), m)) for m in (0, 1, 2, 5)}
    for member in (0, 1, 5):
        found = served_logprobs(engine, [member])[0]
        assert (found - dense[member]).abs().max() < served.case.tolerance
        for other in dense.keys() - {member}:
            assert (found - dense[other]).abs().max() > served.case.apart


def same(found: Tensor, other: Tensor, tolerance: float) -> bool:
    """Bit for bit on a CPU. A GPU's library may sum in another order in a batch of another size."""
    return torch.equal(found, other) if serves_on_cpu() else torch.allclose(found, other, rtol=0, atol=tolerance)


def same_tokens(found: Sequence[tuple[int, ...]], other: Sequence[tuple[int, ...]]) -> bool:
    """All of them on a CPU; on a GPU most, as a token goes the other way where two are as probable."""
    equal = sum(map(operator.eq, found, other))
    return len(found) == len(other) and equal >= len(found) * (1 if serves_on_cpu() else 0.9)


def test_base_requests_in_a_mixed_batch_are_the_base_model(served: Served) -> None:
    engine = served.engine
    alone = served_logprobs(engine, [None])[0]
    assert (alone - transformers_logprobs(served.model_dir)).abs().max() < served.case.tolerance
    engine.begin(served.noise(), POPULATION)
    mixed = served_logprobs(engine, [0, None, 3, 1])
    assert same(mixed[1], alone, served.case.tolerance)
    assert (mixed[0] - alone).abs().max() > served.case.apart


def test_scores_are_those_of_the_dense_model(served: Served) -> None:
    """More members than slots, and a tree too large for one pass beside a second one that shares nothing with it."""
    engine = served.engine
    engine.begin(served.noise(), POPULATION)
    completions = [
        (PROMPTS[0], (5, 6, 7, 8)),
        (PROMPTS[1], (9,)),
        (PROMPTS[0], (5, 6, 17)),
        (PROMPTS[0], (5, 6, 7, 8)),
        (PROMPTS[0][:20], (*PROMPTS[0][20:], 5, 3)),
    ]
    members = [None, *range(POPULATION)]
    before = served_logprobs(engine, [0, None])
    found = engine.score(completions, members)
    assert found.shape == (7, 4 + 1 + 3 + 4 + 22)
    tolerance = min(served.case.tolerance, 1e-4) if served.case.dtype == "float32" else served.case.tolerance
    for row, member in zip(found, members, strict=True):
        if member in (None, 0, 5):
            added = {} if member is None else perturbation(engine, served.noise(), member)
            right = dense_scores(served.model_dir, completions, added)
            assert (row - right).abs().max() < tolerance
    assert all((found[a] - found[b]).abs().max() > served.case.apart for a in range(7) for b in range(a))
    # Four members have slots, and the base model needs none.
    assert len(list(engine.scoring(completions, members))) == 2
    engine._batch_tokens = 45
    assert torch.allclose(engine.score(completions, members), found, atol=tolerance)
    assert same(served_logprobs(engine, [0, None]), before, tolerance)


@some
def test_members_do_not_depend_on_slots_order_or_batch(served: Served) -> None:
    """Six members on four slots, backwards, and one at a time: the same tokens."""
    engine = served.engine
    engine.begin(served.noise(), POPULATION)
    requests = [Request(prompt_ids=prompt, member=m) for m in range(POPULATION) for prompt in PROMPTS]
    together = [completion.token_ids for completion in engine.generate(requests, GREEDY)]
    engine.begin(served.noise(), POPULATION)
    backwards = [completion.token_ids for completion in engine.generate(requests[::-1], GREEDY)][::-1]
    engine.begin(served.noise(), POPULATION)
    alone = [engine.generate([request], GREEDY)[0].token_ids for request in requests]
    assert same_tokens(together, backwards)
    assert same_tokens(together, alone)
    assert len({together[3 * m] for m in range(POPULATION)}) > 1


@some
def test_members_do_not_depend_on_waves_and_lengths(served: Served) -> None:
    """Twelve members on four slots, prompts and completions of many lengths: shuffled, in waves, in one go."""
    engine, population = served.engine, 12
    requests = [
        Request(prompt_ids=PROMPTS[m % 3][: 10 + 3 * m % 29], member=m, seed=17 * m)
        for m in range(population)
        for _ in "ab"
    ]
    engine.begin(served.noise(), population)
    free = Decoding(max_tokens=16, temperature=1.0)
    texts = [completion.text for completion in engine.generate(requests, free)]
    common = max(sorted(set("".join(texts))), key=lambda character: sum(character in text[2:] for text in texts))
    decoding = replace(free, stop=(common,))

    def tokens(requests: list[Request]) -> list[tuple[int, ...]]:
        return [completion.token_ids for completion in engine.generate(requests, decoding)]

    together = tokens(requests)
    assert len({len(token_ids) for token_ids in together}) > 4
    engine.begin(served.noise(), population)
    in_waves = [token_ids for wave in range(0, len(requests), 7) for token_ids in tokens(requests[wave : wave + 7])]
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = dict(zip(order, tokens([requests[i] for i in order]), strict=True))
    assert same_tokens(together, in_waves)
    assert same_tokens(together, [shuffled[i] for i in range(len(requests))])


def slot_factors(module: Any, slot: int, c: int, rank: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """A [R, O] and B [R, I] of slice `c`, rows `begin` to `end` of the layer: `slots.RowBuffers`."""
    A_RO = module.lora_b_stacked[0][slot, rank * begin : rank * end].view(rank, -1)
    return A_RO, module.lora_a_stacked[0][slot, c]


def test_slots_hold_the_bits_that_the_update_credits(served: Served) -> None:
    """Both sides of every slice in a slot are, bit for bit, what `served_factors` gives to the update."""
    engine = served.engine
    engine.begin(served.noise(), POPULATION)
    engine.generate([Request(prompt_ids=PROMPTS[0], member=m) for m in (2, 3)], GREEDY)
    population = engine._llm.model_executor.driver_worker.worker.model_runner.es_population
    for member, sign in ((2, 1.0), (3, -1.0)):
        slot = population.slots.member_in.index(member)
        for layer in population.layers:
            for c, (name, begin, end) in enumerate(layer.slices()):
                A_KOR, B_KIR = served_factors(
                    served.noise(), torch.tensor([1]), name, end - begin, layer.in_features, engine.dtype, "cpu"
                )
                A_RO, B_RI = slot_factors(layer.module, slot, c, served.case.rank, begin, end)
                assert torch.equal(A_RO.cpu(), sign * A_KOR[0].T)
                assert torch.equal(B_RI.cpu(), B_KIR[0].T)


def test_after_an_update_the_exported_model_is_what_is_served(served: Served, tmp_path: Path) -> None:
    engine = served.engine
    before = served_logprobs(engine, [None])[0]
    engine.begin(served.noise(), POPULATION)
    report = engine.update(served.update()).report
    after = served_logprobs(engine, [None])[0]
    engine.export(tmp_path / "model")
    assert report.rms == pytest.approx(0.02, rel=0.05)
    assert (after - before).abs().max() > served.case.apart
    assert (after - transformers_logprobs(tmp_path / "model")).abs().max() < served.case.tolerance
    if served.case.masters == "float32":
        masters, base = engine.state(), load_file(served.model_dir / "model.safetensors")
        exported = load_file(tmp_path / "model" / "model.safetensors")
        assert exported.keys() == base.keys() > engine.shapes.keys()
        for name, tensor in exported.items():
            assert torch.equal(tensor, masters.get(f"master/{name}", base[name]).to(engine.dtype))


@few
def test_an_update_without_sampled_noise_has_the_same_bits(served: Served) -> None:
    """A replay has no factors at hand and rebuilds them."""
    engine = served.engine
    before = {name: tensor.clone() for name, tensor in engine.state().items()}
    engine.begin(served.noise(), POPULATION)
    engine.update(served.update())
    sampled = engine.checksum()
    engine.load_state(before)
    assert engine.checksum() != sampled
    engine.replay([served.update()])
    assert engine.checksum() == sampled


@few
def test_noise_that_is_too_much_to_keep_is_made_again_to_the_same_bits(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, sampled, updated = served.engine, [], []
    before = {name: tensor.clone() for name, tensor in engine.state().items()}
    for kept_bytes in (members.KEPT_BYTES, 0, members.KEPT_BYTES):
        monkeypatch.setattr(members, "KEPT_BYTES", kept_bytes)
        engine.load_state(before)
        engine.begin(served.noise(2), POPULATION)  # so that the next one is not at hand
        engine.begin(served.noise(), POPULATION)
        sampled.append(served_logprobs(engine, [0, 5, 2]))
        engine.update(served.update())
        updated.append(engine.checksum())
    assert all(torch.equal(each, sampled[0]) for each in sampled)
    assert len(set(updated)) == 1


def test_members_follow_the_updated_weights(served: Served, tmp_path: Path) -> None:
    """Same noise, new weights: prefixes computed with the old ones must not be used."""
    engine = served.engine
    engine.begin(served.noise(), POPULATION)
    old = served_logprobs(engine, [0])[0]
    engine.update(served.update())
    engine.begin(served.noise(), POPULATION)
    new = served_logprobs(engine, [0])[0]
    engine.export(tmp_path / "model")
    right = transformers_logprobs(tmp_path / "model", perturbation(engine, served.noise(), 0))
    assert (new - right).abs().max() < served.case.tolerance
    assert (new - old).abs().max() > served.case.apart


def test_weights_from_outside_are_served(served: Served, tmp_path: Path) -> None:
    """Every tensor of the checkpoint, moved by more than bfloat16 can hide; and back to the start, to the bit."""
    if served.case.layers or served.case.kind in MIXTURES:
        pytest.skip("only GRPO sends weights, and it trains every layer and no mixtures of experts")
    engine, before = served.engine, served_logprobs(served.engine, [None])[0]
    base = load_file(served.model_dir / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    moved = {
        name: (tensor + 0.2 * tensor.abs().mean() * torch.randn(tensor.shape, generator=generator)).to(engine.dtype)
        for name, tensor in base.items()
    }
    directory = shutil.copytree(served.model_dir, tmp_path / "model")
    save_file(moved, directory / "model.safetensors", metadata={"format": "pt"})
    engine.load_weights(moved)
    found = served_logprobs(engine, [None])[0]
    engine.load_weights(base)
    assert (found - transformers_logprobs(directory)).abs().max() < served.case.tolerance
    assert (found - before).abs().max() > served.case.apart
    assert torch.equal(served_logprobs(engine, [None])[0], before)


@torch.inference_mode()
def served_bytes(engine: VllmEngine) -> dict[str, bytes]:
    """Of all that vLLM computes with. A linear weight on CPU is packed: its product with the identity is its bits."""
    runner = engine._llm.model_executor.driver_worker.worker.model_runner
    tensors = dict([*runner.model.named_parameters(), *runner.model.named_buffers()])
    for layer in runner.es_population.layers if serves_on_cpu() else ():
        base = layer.module.base_layer
        tensors.pop(f"{layer.name}.base_layer.weight")
        identity = torch.eye(layer.in_features, dtype=engine.dtype)
        tensors[layer.name] = base.cpu_linear(identity, base.weight, None)
    return {name: bytes_of(tensor) for name, tensor in tensors.items()}


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes()


@few
def test_nothing_is_ever_subtracted(served: Served) -> None:
    """A hundred populations leave every byte as it was; an update changes those of trained layers alone."""
    engine = served.engine
    before, masters, base = served_bytes(engine), engine.checksum(), served_logprobs(engine, [None])
    linear = engine._llm.model_executor.driver_worker.worker.model_runner.es_population.layers
    if serves_on_cpu() and served.case.masters == "float32":  # what is compared is what the masters round to
        state = engine.state()
        for layer in linear:
            rounded = torch.cat([state[f"master/{name}"].to(engine.dtype) for name in layer.parameters])
            assert before[layer.name] == bytes_of(rounded.T)
    tokens = set()
    for step in range(1, 101):
        engine.begin(served.noise(step), POPULATION)
        requests = [Request(prompt_ids=(5 + step, 7, 11), member=m) for m in (*range(POPULATION), None)]
        tokens |= {completion.token_ids for completion in engine.generate(requests, Decoding(max_tokens=1))}
    assert len(tokens) > 20  # the members were at work
    assert served_bytes(engine) == before
    assert engine.checksum() == masters
    assert torch.equal(served_logprobs(engine, [None]), base)
    engine.update(served.update())
    after = served_bytes(engine)
    changed = {name.removesuffix(".base_layer.weight") for name in before if before[name] != after[name]}
    assert changed == {layer.name for layer in linear}


WRITING_EVENTS = ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "subprocess.Popen")
_opened: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event in WRITING_EVENTS:
        _opened.append(f"{event} {arguments[0]}")
    if _opened is not None and event == "open":
        path, mode, flags = arguments
        if (mode and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR):
            _opened.append(str(path))


sys.addaudithook(_audit)  # cannot be removed again, so it is added once


@few
def test_no_file_is_written_while_sampling(served: Served) -> None:
    global _opened
    served.engine.begin(served.noise(), POPULATION)
    served.engine.generate([Request(prompt_ids=PROMPTS[0], member=m) for m in range(POPULATION)], GREEDY)  # may compile
    try:
        _opened = []
        sample_population(served.engine, PROMPTS, range(POPULATION), 1, GREEDY, seed=0, step=1)
        written, _opened = _opened, []
        Path(os.devnull).open("w").close()
        assert _opened == [os.devnull]  # the hook does see writes
    finally:
        _opened = None
    assert written == []


@few
def test_stop_strings_end_a_completion(served: Served) -> None:
    """A character by its token ids, a longer string by detokenising: the same text, cut before it."""
    engine = served.engine
    long = Decoding(max_tokens=24)
    request = Request(prompt_ids=PROMPTS[0])
    text = engine.generate([request], long)[0].text
    stop = text[len(text) // 2]
    (by_id,) = engine.generate([request], Decoding(max_tokens=24, stop=(stop,)))
    assert by_id.text == text[: text.index(stop)]
    assert not by_id.truncated
    pair = text[len(text) // 2 : len(text) // 2 + 2]
    (by_text,) = engine.generate([request], Decoding(max_tokens=24, stop=(pair,)))
    assert by_text.text == text[: text.index(pair)]


@few
def test_an_interrupted_call_leaves_the_engine_usable(served: Served) -> None:
    engine = served.engine
    requests = [Request(prompt_ids=prompt) for prompt in PROMPTS]
    expected = engine.generate(requests, GREEDY)
    with closing(engine.stream([*requests, Request(prompt_ids=PROMPTS[1][:20])], GREEDY)) as stream:
        next(stream)
    assert engine.generate(requests, GREEDY) == expected
