"""What the Triton launchers decide, and both of their ways to the same maps."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from cvg_kernels._triton import attention  # noqa: E402
from python_ref import attention as reference  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_capture_is_fused_where_keys_are_few_and_tiles_many():
    h100 = 132
    assert attention.fuse_capture(16, 2560, 77, 8, 128, h100)  # VideoCrafter2 cross
    assert attention.fuse_capture(1, 32760, 512, 8, 128, h100)  # Wan cross
    assert not attention.fuse_capture(1, 17776, 17776, 8, 128, h100)  # CogVideoX joint: long keys
    assert not attention.fuse_capture(1, 2560, 77, 8, 128, h100)  # too few tiles to fill the GPU
    assert not attention.fuse_capture(
        16, 2560, 77, 65, 128, h100
    )  # more tokens than a program holds


@pytest.mark.parametrize("head_dim", [1, 40, 64, 128, 256])
@pytest.mark.parametrize("element_size", [2, 4])
def test_tiles_suit_tensor_cores(head_dim, element_size):
    for tile in (
        attention.forward_tile(head_dim, element_size),
        attention.backward_tile(head_dim, element_size),
    ):
        assert tile.rows >= 16 and tile.columns >= 16
        assert tile.rows & (tile.rows - 1) == 0 and tile.columns & (tile.columns - 1) == 0


@pytest.mark.parametrize("tokens", [3, 70], ids=["few", "several-blocks"])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_fused_and_apart_agree(tokens, masked):
    query = torch.randn(2, 3, 37, 24, device=DEVICE)
    key, value = torch.randn(2, 2, 3, 90, 24, device=DEVICE).unbind(0)
    ids = torch.randint(90, (2, tokens), device=DEVICE)
    bias = torch.randn(2, 90, device=DEVICE) if masked else None
    ran = {}
    for name, processors in (("fused", 1), ("apart", 10**6)):
        launches, (out, maps, lse) = attention.forward_launches(
            query, key, value, ids, bias, 0.2, True, processors=processors
        )
        for tensor in (out, maps, lse):
            tensor.fill_(float("nan"))
        for launch in launches:
            launch.run()
        ran[name] = [launch.kernel.__name__ for launch in launches]
        wanted = reference.attention_with_capture(
            query.double(), key.double(), value.double(), ids, scale=0.2,
            mask=None if bias is None else bias.double()[:, None, None], head_mean=True,
        )  # fmt: skip
        for found, exact in zip((out, maps, lse), wanted, strict=True):
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    assert ran["apart"] == ["forward_kernel", "capture_kernel"]
    assert ran["fused"] == (["forward_kernel"] if tokens <= 64 else ran["apart"])
