"""What the Triton launchers of temporal attention decide: how sequences share tiles, and who sums what."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from cvg_kernels._triton import temporal_attention  # noqa: E402
from cvg_kernels.kernels import Facts  # noqa: E402
from cvg_kernels.ops import _choice  # noqa: E402
from cvg_kernels.reference import temporal_attention as reference  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("frames", [1, 2, 7, 16, 17, 31, 64, 65, 128])
@pytest.mark.parametrize("element_size", [2, 4])
def test_tiles_hold_whole_sequences(frames, element_size):
    for summing in (False, True):
        tile = temporal_attention.tile_of(frames, element_size, summing=summing)
        assert tile.rows >= 16 and tile.rows & (tile.rows - 1) == 0
        assert tile.sequences >= 1 and tile.sequences * frames <= tile.rows
        assert (tile.sequences + 1) * frames > tile.rows


@pytest.mark.drawn(6)
@pytest.mark.parametrize("dim, unit", [(40, 8), (72, 8), (88, 8), (64, 1), (36, 1)])
def test_rows_begin_at_16_bytes_where_they_can(dim, unit):
    """As diffusers has heads, `[P, F, H, D].transpose(1, 2)`:
    16 divides the strides, or units of 8 say that 8 does.
    """
    given = torch.randn(3, 2, 5, 16, 3, dim, dtype=torch.float16, device=DEVICE)
    given = given.transpose(3, 4).unbind(0)
    launch, (out, _) = temporal_attention.forward_launch(*given, None, 0.3, False, False)
    assert {launch.constants[f"{name}_UNIT"] for name in ("QUERY", "KEY", "VALUE", "OUT")} == {unit}
    assert launch.num_warps * 8 <= launch.constants["ROWS"]
    launch.run()
    wanted, _ = reference.temporal_attention(*given, None, scale=0.3, scale_bias_by_row_max=False)
    torch.testing.assert_close(out, wanted, rtol=2e-3, atol=2e-3)

    grad = torch.ones((), dtype=torch.float16, device=DEVICE).expand_as(out)  # of a sum
    call = (grad, None, *given, None, 0.3, False, True, True, True, True, False)
    launch, grads = temporal_attention.backward_launch(*call)
    assert launch.arguments["grad_out"].stride(-1) == 1
    launch.run()
    wanted = reference.temporal_attention_backward(grad, None, *given, None, scale=0.3, scale_bias_by_row_max=False)
    for found, right in zip(grads[:3], wanted[:3], strict=True):
        torch.testing.assert_close(found, right, rtol=5e-3, atol=5e-3)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("positions, frames", [(5, 16), (13, 7), (3, 33), (70, 1)], ids=str)
def test_every_sequence_has_its_place(positions, frames):
    """A last tile that is not full, positions of two samples in one tile, and nothing written beyond."""
    given = torch.randn(3, 2, positions, 3, frames, 8, device=DEVICE).unbind(0)
    added = torch.rand(frames, frames, device=DEVICE)
    launch, (out, maps) = temporal_attention.forward_launch(*given, added, 0.3, True, True)
    out.fill_(torch.nan), maps.fill_(torch.nan)
    launch.run()
    sequences = launch.constants["SEQUENCES"]
    assert launch.grid == (-(-2 * positions // sequences),)  # one program takes all heads: it owns the maps
    wanted = reference.temporal_attention(
        *(t.double() for t in given), added.double(), scale=0.3, scale_bias_by_row_max=True, capture=True
    )
    for found, exact in zip((out, maps), wanted, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    launch, _ = temporal_attention.forward_launch(*given, added, 0.3, True, False)
    assert launch.grid == (3 * -(-2 * positions // sequences),)


@pytest.mark.drawn(8, of="long tests")
def test_programs_that_sum_take_several_tiles(monkeypatch):
    """The band's gradient does not depend on how many programs share the tiles."""
    given = torch.randn(3, 1, 9, 2, 16, 8, device=DEVICE).unbind(0)
    added, grad_out = torch.rand(16, 16, device=DEVICE), torch.randn_like(given[0])
    needed = (True, True, True, True)
    wanted = reference.temporal_attention_backward(
        grad_out, None, *given, added, scale=0.3, scale_bias_by_row_max=True
    )
    for programs in (1, 4, 1024):
        monkeypatch.setattr(temporal_attention, "_SUMMING_PROGRAMS", programs)
        call = (grad_out, None, *given, added, 0.3, True, True, *needed)
        launch, _ = temporal_attention.backward_launch(*call)
        assert launch.grid[0] <= programs
        for found, right in zip(temporal_attention.backward(*call), wanted, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_offsets_are_counted_in_64_bits():
    """Heads that lie 2³⁰ numbers apart; of the memory between them nothing is touched."""
    storage = torch.empty(2**31 + 4096, dtype=torch.float16, device=DEVICE)
    apart = storage.as_strided((3, 1, 2, 3, 16, 8), (512, 0, 128, 2**30, 8, 1))
    apart.copy_(torch.randn(apart.shape))
    close = apart.contiguous().unbind(0)
    launch, (out, _) = temporal_attention.forward_launch(*apart.unbind(0), None, 0.3, False, False)
    launch.run()
    wanted, _ = reference.temporal_attention(*close, None, scale=0.3, scale_bias_by_row_max=False)
    torch.testing.assert_close(out, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "frames, dim, dtype, chosen",
    [
        (128, 128, torch.float16, "cuda"),
        (64, 128, torch.float16, "triton"),
        (129, 8, torch.float16, "reference"),
        (8, 136, torch.bfloat16, "reference"),
        (32, 8, torch.float32, "triton"),
        (33, 8, torch.float32, "reference"),
    ],
)
def test_auto_leaves_to_the_reference_what_the_kernels_do_not_hold(frames, dim, dtype, chosen, monkeypatch):
    monkeypatch.setattr(_choice, "unavailable_reason", lambda *call: None)
    facts = Facts(torch.device("cuda"), dtype, frames=frames, head_dim=dim, value_dim=dim)
    backend, module = _choice.kernel_for("temporal_attention", "auto", facts)
    assert backend.value == chosen
    assert module.__name__.startswith(f"cvg_kernels.{'_triton' if chosen == 'triton' else 'ops'}.")
