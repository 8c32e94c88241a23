"""The layouts of convolutions as views for temporal attention: right places, no copy, the same gradient."""

from __future__ import annotations

import pytest
import torch

import cvg_kernels as cvg
from cvg_kernels.ops import frame_images, frame_sequences
from tests.ops.backends import backends, device_of

BATCH, FRAMES, HEADS, DIM, ROWS, COLUMNS = 2, 5, 3, 8, 4, 6


def images(layout: str) -> torch.Tensor:
    """Channels of the frames of two videos."""
    shape = (BATCH * FRAMES, HEADS * DIM, ROWS, COLUMNS)
    if layout == "channels_last" and backend != "reference":
        return torch.randn(shape).to(memory_format=torch.channels_last)
    if layout == "video":
        return torch.randn(BATCH, HEADS * DIM, FRAMES, ROWS, COLUMNS)
    if layout == "slice":  # the keys of a fused projection
        return torch.randn(shape[0], 3 * shape[1], ROWS, COLUMNS)[:, shape[1] : 2 * shape[1]]
    return torch.randn(shape)


def rearranged(x: torch.Tensor) -> torch.Tensor:
    """`(b h w) n f d`, by copies."""
    if x.ndim == 4:
        x = x.reshape(BATCH, FRAMES, HEADS, DIM, ROWS, COLUMNS).permute(0, 4, 5, 2, 1, 3)
    else:
        x = x.reshape(BATCH, HEADS, DIM, FRAMES, ROWS, COLUMNS).permute(0, 4, 5, 1, 3, 2)
    return x.reshape(BATCH * ROWS * COLUMNS, HEADS, FRAMES, DIM).contiguous()


@pytest.mark.parametrize("layout", ["images", "channels_last", "video", "slice"])
@pytest.mark.parametrize("backend", backends("temporal_attention"))
def test_it_is_the_rearranged_computation_without_its_copy(backend, layout):
    inputs = [images(layout).to(device_of(backend)).requires_grad_() for _ in range(3)]
    frames = None if layout == "video" else FRAMES
    views = [frame_sequences(x, HEADS, frames) for x in inputs]
    for view, x in zip(views, inputs, strict=True):
        assert view.shape == (BATCH, ROWS * COLUMNS, HEADS, FRAMES, DIM)
        assert view.data_ptr() == x.data_ptr() and view._is_view()
        assert torch.equal(view.flatten(0, 1), rearranged(x))
    with cvg.trace_backends() as ran:
        result = cvg.temporal_attention(*views, sigma=1.5, capture=True, backend=backend)
    assert ran == [("temporal_attention", backend)]
    wanted = cvg.temporal_attention(
        *(rearranged(x) for x in inputs), sigma=1.5, capture=True, backend="reference"
    )
    out = frame_images(result.out, inputs[0].shape)
    assert out.shape == inputs[0].shape
    torch.testing.assert_close(rearranged(out), wanted.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.maps.flatten(0, 1), wanted.maps, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)
    right = torch.autograd.grad(wanted.out.square().sum(), inputs)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if layout == "channels_last":  # not even the result is copied
        assert out.data_ptr() == result.out.data_ptr()


@pytest.mark.parametrize("layout", ["images", "channels_last", "video", "slice"])
def test_apart_and_together(layout):
    x = images(layout)
    frames = None if layout == "video" else FRAMES
    assert torch.equal(frame_images(frame_sequences(x, HEADS, frames), x.shape), x)


@pytest.mark.parametrize(
    "x, options, message",
    [
        (torch.zeros(4, 6, 2, 2), {"heads": 2}, "x must be .* with frames=None"),
        (torch.zeros(1, 6, 4, 2, 2), {"heads": 2, "frames": 4}, "x must be .* with frames=4"),
        (torch.zeros(4, 6, 2), {"heads": 2, "frames": 4}, "x must be"),
        (torch.zeros(4, 6, 2, 2), {"heads": 4, "frames": 4}, "heads must divide the 6 channels"),
        (torch.zeros(4, 6, 2, 2), {"heads": 2, "frames": 3}, "frames must divide the 4 images"),
        (
            torch.zeros(4, 6, 2, 4)[..., :3],
            {"heads": 2, "frames": 4},
            "rows and columns that are one",
        ),
        (torch.zeros(4, 6, 3, 2).mT, {"heads": 2, "frames": 4}, "rows and columns that are one"),
    ],
)
def test_errors_name_the_argument(x, options, message):
    with pytest.raises(cvg.ArgumentError, match=message):
        frame_sequences(x, **options)


def test_errors_of_the_way_back():
    with pytest.raises(cvg.ArgumentError, match="out must have five dimensions"):
        frame_images(torch.zeros(4, 2, 3, 8), (3, 16, 2, 2))
