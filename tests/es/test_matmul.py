import pytest
import torch

from eggroll_llm.es.matmul import float32_products


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_a_setting_holds_for_a_while(precision):
    before = torch.get_float32_matmul_precision()
    with float32_products("medium"):
        with float32_products(precision):
            assert torch.get_float32_matmul_precision() == precision
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
