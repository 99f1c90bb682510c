"""C++ and Triton get addresses: what is not exactly what it computes with is refused, and nothing is written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eggroll_llm.engine.vllm.layers import Layer
from eggroll_llm.engine.vllm.ranks import Part
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.kernels import build, fold, member_term
from eggroll_llm.kernels import noise as rows
from eggroll_llm.kernels.norms_triton import Factors, rms_norm, silu_and_mul
from eggroll_llm.kernels.rounding import DEVICE

T, SLICES, INSIDE, SLOTS, RANK = 6, (48, 16), 64, 3, 2
OUT = sum(SLICES)
LAYOUT = rows.RowLayout((("a.weight", 8, 16), ("b.weight", 4, 8)), RANK)
needs_library = pytest.mark.skipif(build.library() is None, reason="needs a C++ compiler")

Change = Callable[[Any], Any]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def scattered(tensor: Tensor) -> Tensor:
    """The same values, every second place in memory."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


WRONG: dict[str, Change] = {
    "one more dimension": lambda x: x[None],
    "fewer rows": lambda x: x[:-1],
    "fewer columns": lambda x: x[..., :-1].contiguous(),
    "not contiguous": scattered,
    "bfloat16": lambda x: x.bfloat16(),
    "float64": lambda x: x.double(),
    "elsewhere": lambda x: x.to("meta"),
}


def refused(function: Callable[..., Any], arguments: dict[str, Any], name: str, change: Change) -> None:
    """`function` works, but not with that argument changed, and then leaves all of them as they were."""
    function(**{key: value.clone() if isinstance(value, Tensor) else value for key, value in arguments.items()})
    wrong = arguments | {name: change(arguments[name])}
    before = {key: value.clone() for key, value in wrong.items() if isinstance(value, Tensor) and not value.is_meta}
    with pytest.raises(ValueError, match=r"must be|does not fit|none of the"):
        function(**wrong)
    assert all(torch.equal(wrong[key], value) for key, value in before.items())


def terms() -> list[member_term.AddTerm]:
    library = build.library()
    return [member_term.add_term_torch] + ([member_term.bind(library)] if library else [])


@pytest.mark.parametrize("add_term", [*terms(), member_term.add_term_triton], ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *[(name, change) for name in ("y_TO", "x_TI", "A_SV", "B_SCRI") for change in WRONG.values()],
        ("B_SCRI", lambda B: B[:, :1].contiguous()),
        ("B_SCRI", lambda B: B[:, :, :1].contiguous()),
        ("B_SCRI", lambda B: B.transpose(1, 2)),
        ("slices", lambda slices: slices[:1]),
        ("slices", lambda slices: (*slices, 1)),
        ("slot_T", lambda slot: slot[: T - 1]),
        ("slot_T", lambda slot: slot.long()),
        ("slot_T", scattered),
        ("slot_T", lambda slot: torch.stack([slot, slot], dim=1)),
    ],
)
def test_the_member_term_takes_nothing_else(add_term: member_term.AddTerm, name: str, change: Change) -> None:
    where = DEVICE if add_term is member_term.add_term_triton else "cpu"
    refused(add_term, term_arguments(where), name, change)


def term_arguments(where: str = "cpu") -> dict[str, Any]:
    arguments = {
        "y_TO": random(T, OUT),
        "x_TI": random(T, INSIDE),
        "A_SV": random(SLOTS, RANK * OUT),
        "B_SCRI": random(SLOTS, len(SLICES), RANK, INSIDE),
        "slot_T": torch.tensor([0, -1, 2, 1, 1, 2, -1, 0], dtype=torch.int32),
    }
    return {"slices": SLICES} | {key: tensor.to(where) for key, tensor in arguments.items()}


@pytest.mark.parametrize("add_term", terms(), ids=lambda function: function.__name__)
def test_a_slot_that_does_not_exist_is_refused_on_a_cpu(add_term: member_term.AddTerm) -> None:
    refused(add_term, term_arguments(), "slot_T", lambda slot: slot.clamp(min=SLOTS))


def test_a_slot_that_does_not_exist_is_no_slot_on_a_gpu() -> None:
    """Which cannot raise: its token is left alone, and nothing outside of the slots is read."""
    arguments = term_arguments(DEVICE)
    before = arguments["y_TO"].clone()
    arguments["slot_T"] = arguments["slot_T"].clamp(min=SLOTS)
    arguments["slot_T"][2] = 2
    member_term.add_term_triton(**arguments)
    assert (arguments["y_TO"] != before).any(dim=1).nonzero().flatten().tolist() == [2]


@needs_library
def test_a_rank_beyond_the_kernels_buffer_is_refused() -> None:
    rank = member_term.MAX_RANK + 1
    y_TO, x_TI, slot_T = random(T, OUT), random(T, INSIDE), torch.zeros(T, dtype=torch.int32)
    with pytest.raises(ValueError, match="of rank 64 at most"):
        member_term.bind(build.library())(  # type: ignore[arg-type]
            y_TO, x_TI, random(SLOTS, rank * OUT), random(SLOTS, 2, rank, INSIDE), slot_T, SLICES
        )


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=needs_library), "cuda"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *[("to_OI", change) for change in WRONG.values()],
        *[("served_OI", change) for wrong, change in WRONG.items() if wrong != "bfloat16"],
        *[("columns_A", change) for wrong, change in WRONG.items() if wrong != "not contiguous"],
        *[("columns_B", change) for wrong, change in WRONG.items() if wrong != "not contiguous"],
    ],
)
def test_the_fold_takes_nothing_else(name: str, change: Change, device: str) -> None:
    folded, where = fold.fold_for(torch.device(device)), DEVICE if device == "cuda" else "cpu"

    def function(to_OI: Tensor, columns_A: Tensor, columns_B: Tensor, served_OI: Tensor) -> None:
        folded(to_OI, [(columns_A, columns_B)], served_OI)

    shapes = {"to_OI": (8, 20), "columns_A": (4, 8), "columns_B": (4, 20), "served_OI": (8, 20)}
    refused(function, {key: random(*shape).to(where) for key, shape in shapes.items()}, name, change)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *[("rows_KV", change) for wrong, change in WRONG.items() if wrong != "bfloat16"],
        ("pairs_K", lambda pairs: pairs[:-1]),
        ("noise", lambda noise: NoiseSpec(seed=noise.seed, step=1, rank=RANK + 1, sigma=noise.sigma)),
        ("noise", lambda noise: NoiseSpec(seed=noise.seed, step=1, rank=RANK - 1, sigma=noise.sigma)),
    ],
)
def test_rows_are_filled_in_no_other_memory(
    name: str, change: Change, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(build, "library", lambda: None)
    noise, pairs_K = NoiseSpec(seed=1, step=1, rank=RANK, sigma=0.1), torch.tensor([0, 3, 2])
    arguments = {"rows_KV": torch.zeros(3, LAYOUT.width), "noise": noise, "pairs_K": pairs_K, "layout": LAYOUT}
    refused(rows.fill, arguments, name, change)


@needs_library
@pytest.mark.vllm
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *[("x", change) for wrong, change in WRONG.items() if wrong != "one more dimension"],
        ("x", lambda x: x[None, None]),
        ("x", lambda x: x[0]),
        *[("residual", change) for change in WRONG.values()],
        ("weight", lambda weight: weight[:-1]),
        ("weight", lambda weight: weight[None]),
        ("weight", scattered),
        ("weight", lambda weight: weight.bfloat16()),
    ],
)
def test_the_fused_norm_takes_nothing_else(name: str, change: Change) -> None:
    from eggroll_llm.engine.vllm import norms

    rms_norm, _ = norms.bind(build.library())  # type: ignore[arg-type]
    arguments = {"x": random(5, 48), "residual": random(5, 48), "weight": random(48), "epsilon": 1e-5}
    refused(rms_norm, arguments, name, change)


@needs_library
@pytest.mark.vllm
def test_the_fused_activation_takes_nothing_else() -> None:
    from eggroll_llm.engine.vllm import norms

    _, silu_and_mul = norms.bind(build.library())  # type: ignore[arg-type]
    x = random(5, 96)
    assert torch.equal(silu_and_mul(scattered(x)), silu_and_mul(x))
    assert silu_and_mul(x[None]).shape == (1, 5, 48)
    assert silu_and_mul(x[:, :0]).shape == (5, 0)
    for change in ("fewer columns", "float64", "elsewhere"):
        refused(silu_and_mul, {"x": x}, "x", WRONG[change])


Wrongs = list[tuple[str, Change]]
FACTORS: Wrongs = [
    *[("A_SV", change) for wrong, change in WRONG.items() if wrong != "one more dimension"],
    *[("B_SCRI", change) for wrong, change in WRONG.items() if wrong != "fewer columns"],
    ("h_TCR", lambda h: h[:, :, :1].contiguous()),
    *[("h_TCR", change) for change in WRONG.values()],
    ("B_after", lambda B: B[..., :-1].contiguous()),
    ("slot_T", lambda slot: slot[:-1]),
    ("slot_T", lambda slot: slot.long()),
    ("slot_T", scattered),
    ("slot_T", lambda slot: torch.stack([slot, slot], dim=1)),
]


def with_factors(slices: tuple[int, ...], size: int) -> dict[str, Tensor]:
    """Those of a layer before, of these slices, and of one of 8 out features after."""
    tensors = {
        "A_SV": random(SLOTS, RANK * sum(slices)),
        "B_SCRI": random(SLOTS, len(slices), RANK, INSIDE),
        "h_TCR": random(T, len(slices), RANK),
        "A_after": random(SLOTS, RANK * 8),
        "B_after": random(SLOTS, 1, RANK, size),
        "slot_T": torch.tensor([0, -1, 2, 1, 1, 2], dtype=torch.int32),
    }
    return {key: tensor.to(DEVICE) for key, tensor in tensors.items()}


def terms_of(slices: tuple[int, ...], tensors: dict[str, Tensor]) -> tuple[tuple[Factors, Tensor], Factors]:
    before = Factors(tensors["A_SV"], tensors["B_SCRI"], tensors["slot_T"], slices)
    return (before, tensors["h_TCR"]), Factors(tensors["A_after"], tensors["B_after"], tensors["slot_T"], (8,))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *FACTORS,
        *[("y_TI", change) for wrong, change in WRONG.items() if wrong != "one more dimension"],
        *[("residual_TI", change) for change in WRONG.values()],
        ("weight_I", lambda weight: weight[:-1]),
        ("weight_I", lambda weight: weight[None]),
        ("weight_I", scattered),
        ("weight_I", lambda weight: weight.bfloat16()),
    ],
)
def test_the_norm_between_layers_takes_nothing_else(name: str, change: Change) -> None:
    def function(y_TI: Tensor, residual_TI: Tensor, weight_I: Tensor, **tensors: Tensor) -> None:
        rms_norm(y_TI, residual_TI, weight_I, 1e-5, *terms_of((48,), tensors))

    shapes = {"y_TI": (T, 48), "residual_TI": (T, 48), "weight_I": (48,)}
    arguments = {key: random(*shape).to(DEVICE) for key, shape in shapes.items()}
    refused(function, arguments | with_factors((48,), 48), name, change)


@pytest.mark.parametrize(
    ("name", "change"),
    [*FACTORS, *[("y_TO", change) for wrong, change in WRONG.items() if wrong != "one more dimension"]],
)
def test_the_activation_between_layers_takes_nothing_else(name: str, change: Change) -> None:
    def function(y_TO: Tensor, **tensors: Tensor) -> None:
        silu_and_mul(y_TO, *terms_of((48, 48), tensors))

    refused(function, {"y_TO": random(T, 96).to(DEVICE)} | with_factors((48, 48), 48), name, change)


def test_both_layers_around_an_activation_have_the_same_slots() -> None:
    y_TO, tensors = random(T, 96).to(DEVICE), with_factors((48, 48), 48)
    before, _ = terms_of((48, 48), tensors)
    A, B, slot_T = tensors["A_after"], tensors["B_after"], tensors["slot_T"]
    for after in (Factors(A, B, slot_T.clone(), (8,)), Factors(A[:-1], B[:-1], slot_T, (8,))):
        with pytest.raises(ValueError, match="must be that of the layer before, of 3 slots"):
            silu_and_mul(y_TO, before, after)


@needs_library
@pytest.mark.vllm
def test_a_norm_that_c_cannot_compute_is_left_to_vllm() -> None:
    """A single row."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.layernorm import RMSNorm

    from eggroll_llm.engine.vllm import norms

    with set_current_vllm_config(VllmConfig()):
        norm = RMSNorm(48, eps=1e-5, dtype=torch.float32)
    expected = norm.forward_native(random(48))
    norms.install(norm)
    assert norm._forward_method != norm.forward_native
    assert torch.equal(norm(random(48)), expected)


class Module:
    """What a layer of vLLM, wrapped for adapters, has."""

    def __init__(self, weight: Tensor) -> None:
        self.base_layer = self
        self.weight = weight
        self.lora_a_stacked = (random(SLOTS, len(SLICES), RANK, INSIDE),)
        self.lora_b_stacked = (random(SLOTS, RANK * OUT),)

    def cpu_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, weight, bias)


@pytest.mark.vllm
@pytest.mark.parametrize("add_term", terms(), ids=lambda function: function.__name__)
def test_a_layer_takes_activations_with_a_batch_dimension_and_any_strides(add_term: member_term.AddTerm) -> None:
    """As vLLM's Transformers backend has them: the same bits as without, whatever lies between them in memory."""
    from eggroll_llm.engine.vllm.worker import _linear_with_term

    module = Module(random(OUT, INSIDE))
    layer = Layer(
        name="l", module=module, parameters=("a", "b"), parts=tuple(Part(shape=(size, INSIDE)) for size in SLICES)
    )
    slot_T = torch.tensor([0, -1, 2, 1, 1, 2, -1], dtype=torch.int32)
    apply = _linear_with_term(layer, slot_T, add_term)
    x_TI = random(T, INSIDE)
    expected = apply(x_TI)
    plain = module.cpu_linear(x_TI, module.weight, None)
    assert torch.equal(expected[1], plain[1])  # of the base model
    assert ((expected - plain).abs().amax(1) > 1).tolist() == [True, False, True, True, True, True]
    transposed = x_TI.T.contiguous().T
    for x in (x_TI[None], scattered(x_TI), scattered(x_TI)[None], transposed, transposed[None]):
        found = apply(x)
        assert found.shape == (*x.shape[:-1], OUT)
        torch.testing.assert_close(found.view(T, OUT), expected, rtol=0, atol=1e-4)
    assert torch.equal(apply(x_TI[None])[0], expected)
    assert torch.equal(apply(x_TI.view(2, 3, INSIDE)).view(T, OUT), expected)
    with pytest.raises(ValueError, match=r"slot is torch\.int32"):
        apply(random(T + 2, INSIDE))
