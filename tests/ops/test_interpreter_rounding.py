"""Triton's interpreter, as the tests run it, rounds 16-bit numbers as GPUs do."""

from __future__ import annotations

import pytest
import torch

from tests.ops.backends import DEVICE

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def there_and_back(source, stored, cast, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    numbers = tl.load(source + at)
    tl.store(stored + at, numbers)
    tl.store(cast + at, numbers.to(stored.dtype.element_ty).to(tl.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_float32_goes_to_the_nearest(dtype):
    special = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 3.4e38, 65519.0, 65520.0, 1e-40, 6e-8]
    ties = 1 + torch.arange(16) / 256 + torch.tensor([0.0, 2**-9]).repeat_interleave(8)
    numbers = torch.cat([torch.tensor(special), ties, -ties, torch.randn(4096)])[:4096].to(DEVICE)
    stored = torch.empty(4096, dtype=dtype, device=DEVICE)
    cast = torch.empty(4096, device=DEVICE)
    there_and_back[(1,)](numbers, stored, cast, 4096)
    wanted = numbers.to(dtype)
    torch.testing.assert_close(stored, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(cast, wanted.float(), rtol=0, atol=0, equal_nan=True)
