"""The fused norm and activation against vLLM's own, to the rounding of the served format."""

import pytest
import torch
from torch import Tensor

from eggroll_llm.engine.vllm import norms
from eggroll_llm.kernels import build

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(build.library() is None, reason="needs a C++ compiler"),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def vllm_config():
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))).to(dtype)


def norm(size: int, dtype: torch.dtype):
    from vllm.model_executor.layers.layernorm import RMSNorm

    module = RMSNorm(size, eps=1e-5, dtype=dtype)
    module.weight.data.copy_(random(size, dtype=dtype).abs() + 0.5)
    return module


def assert_same_but_for_rare_last_bits(found: Tensor, right: Tensor) -> None:
    """Sums in another order and another exp: float32 differs in the last digits, bfloat16 hardly ever at all."""
    difference = (found.double() - right.double()).abs()
    if right.dtype == torch.float32:
        assert (difference <= 1e-6 * right.abs().clamp(min=1)).all()
    else:
        assert (difference <= 2**-6 * right.abs()).all()
        assert float((difference > 0).double().mean()) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 100, 576])
def test_a_norm_is_that_of_vllm(size: int, dtype: torch.dtype) -> None:
    module, x = norm(size, dtype), random(37, size, dtype=dtype)
    expected = module.forward_native(x.clone())
    norms.install(module)
    assert module._forward_method != module.forward_native
    assert_same_but_for_rare_last_bits(module(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_after_a_residual_returns_both(dtype: torch.dtype) -> None:
    module, x, residual = norm(576, dtype), random(37, 576, dtype=dtype), random(37, 576, dtype=dtype, scale=3)
    expected, expected_sum = module.forward_native(x.clone(), residual.clone())
    norms.install(module)
    found, found_sum = module(x, residual)
    assert torch.equal(found_sum, expected_sum)
    assert_same_but_for_rare_last_bits(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_inside_a_fused_projection_are_normed_in_place_of_their_rows(dtype: torch.dtype) -> None:
    """Qwen3 norms the heads of q and k: a view [tokens, heads, size] of wider rows."""
    module, qkv = norm(32, dtype), random(37, 8 * 32, dtype=dtype)
    heads = qkv[:, : 4 * 32].unflatten(1, (4, 32))
    expected = module.forward_native(heads.clone())
    norms.install(module)
    assert_same_but_for_rare_last_bits(module(heads), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_covered_goes_to_vllm(dtype: torch.dtype) -> None:
    module = norm(32, dtype)
    x = random(32, 37, dtype=dtype).T
    expected = module.forward_native(x.clone())
    norms.install(module)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 100, 1536])
def test_the_activation_is_that_of_vllm(size: int, dtype: torch.dtype) -> None:
    from vllm.model_executor.layers.activation import SiluAndMul

    module = SiluAndMul()
    x = random(37, 2 * size, dtype=dtype, scale=8)
    x[0, :8] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 100.0, -100.0, 3e38, -3e38]).to(dtype)
    x[0, size : size + 8] = 0.5
    expected = module.forward_native(x.clone())
    model = torch.nn.Sequential(module)
    norms.install(model)
    assert model[0]._forward_method != module._forward_method  # another model may share it
    found = model(x)
    assert_same_but_for_rare_last_bits(found[1:], expected[1:])
    assert torch.allclose(found[0].double(), expected[0].double(), rtol=1e-2, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_one(dtype: torch.dtype) -> None:
    from vllm.model_executor.layers.activation import SiluAndMul

    x = random(2, 64, dtype=dtype)
    x[0, 3] = torch.nan
    for each in map(torch.nn.Sequential, (norm(64, dtype), SiluAndMul())):
        norms.install(each)
        found = each(x)
        assert found[0].isnan().any()
        assert found[1].isfinite().all()
