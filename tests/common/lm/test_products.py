"""Products with a prepared weight against torch's own linear layer."""

from __future__ import annotations

import pytest
import torch
from wardround.common.lm.products import prepared


@pytest.mark.parametrize("shape", [(1,), (28,), (3, 5), (4, 7, 2)])
@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_prepared_product_is_the_linear_layer(shape: tuple[int, ...], rows: int, biased: bool, dtype: torch.dtype):
    torch.manual_seed(0)
    weight, x = torch.randn(11, 19, dtype=dtype), torch.randn(*shape, 19, dtype=dtype)
    bias = torch.randn(11, dtype=dtype) if biased else None
    product = prepared(weight, bias, rows=rows)
    expected = torch.nn.functional.linear(x, weight, bias)
    with torch.inference_mode():
        got = product(x)
    assert got.shape == expected.shape and got.dtype == dtype
    torch.testing.assert_close(got, expected)


def test_a_prepared_weight_is_a_copy():
    weight = torch.ones(3, 2)
    product = prepared(weight)
    weight.zero_()
    assert product(torch.ones(1, 2)).tolist() == [[2.0, 2.0, 2.0]]
