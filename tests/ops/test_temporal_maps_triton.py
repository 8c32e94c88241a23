"""What the Triton launchers of maps between frames decide: tiles, strides and how many programs there are."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from cvg_kernels._triton import temporal_maps  # noqa: E402
from cvg_kernels.ops._temporal_maps_call import Targets, Video  # noqa: E402
from cvg_kernels.reference import temporal_maps as reference  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("one_thread")


def call_of(frames, places, dim, dtype, *, text=0, heads=3, batch=1, head_mean=True):
    """A call without log-sum-exp on `[B, N, H, D].transpose(1, 2)`."""
    shape = (2, batch, text + frames * places, heads, dim)
    query, key = torch.randn(shape, device=DEVICE).to(dtype).transpose(2, 3).unbind(0)
    video = Video(frames, places, text, text)
    return video.call(query, key, None, None, 0.3, head_mean)


@pytest.mark.parametrize("dim, unit", [(40, 8), (72, 8), (88, 8), (64, 1), (36, 1)])
def test_rows_begin_at_16_bytes_where_they_can(dim, unit):
    """16 divides the strides of places and frames, or units of 8 say that 8 does; behind a text of any length too."""
    call = call_of(5, 7, dim, torch.float16, text=3)
    launch, maps = temporal_maps.forward_launch(call)
    assert {launch.constants[f"{name}_UNIT"] for name in ("QUERY", "KEY")} == {unit}
    assert launch.num_warps * 8 <= launch.constants["ROWS"]
    launch.run()
    wanted = reference.temporal_maps(*call[:4], scale=0.3, head_mean=True)
    torch.testing.assert_close(maps, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("places, frames", [(5, 16), (13, 7), (3, 32), (70, 1)], ids=str)
@pytest.mark.parametrize("head_mean", [True, False])
@pytest.mark.drawn(6)
def test_every_sequence_has_its_place(places, frames, head_mean):
    """A last tile that is not full, places of two samples in one tile, and nothing written beyond."""
    call = call_of(frames, places, 8, torch.float32, batch=2, head_mean=head_mean)
    launch, maps = temporal_maps.forward_launch(call)
    maps.fill_(torch.nan)
    launch.run()
    tiles = -(-2 * places // launch.constants["SEQUENCES"])
    # With a mean one program takes all heads: it owns the maps.
    assert launch.grid == (tiles if head_mean else 3 * tiles,)
    wide = call._replace(query=call.query.double(), key=call.key.double())
    wanted = reference.temporal_maps(*wide[:4], scale=0.3, head_mean=head_mean)
    torch.testing.assert_close(maps.double(), wanted, rtol=1e-5, atol=1e-6)

    grad = torch.randn_like(maps)
    targets = Targets(torch.full_like(call.query, torch.nan), torch.full_like(call.key, torch.nan), None)
    launch = temporal_maps.backward_launch(call, grad, targets)
    assert launch.grid == (3 * tiles,) and not launch.constants["NEED_LSE"]
    launch.run()
    found = reference.temporal_maps_backward(grad.double(), *wide[:4], scale=0.3, head_mean=head_mean)
    for have, want in zip(targets[:2], found[:2], strict=True):
        torch.testing.assert_close(have.double(), want, rtol=1e-4, atol=1e-5)


def test_offsets_are_counted_in_64_bits():
    """Frames that lie 2³⁰ numbers apart; of the memory between them nothing is touched."""
    storage = torch.empty(2**31 + 4096, dtype=torch.float16, device=DEVICE)
    apart = storage.as_strided((2, 1, 3, 2, 3, 8), (512, 0, 64, 32, 2**30, 1))  # [2, B, P, H, F, D]
    apart.copy_(torch.randn(apart.shape))
    query, key = apart.unbind(0)
    call = call_of(3, 3, 8, torch.float16, heads=2)._replace(query=query, key=key)
    launch, maps = temporal_maps.forward_launch(call)
    launch.run()
    close = call._replace(query=query.contiguous(), key=key.contiguous())
    wanted = reference.temporal_maps(*close[:4], scale=0.3, head_mean=True)
    torch.testing.assert_close(maps, wanted, rtol=1e-4, atol=1e-5)
