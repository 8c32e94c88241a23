"""The flow of a group of layers: each form against the paths of its graph, one by one."""

from __future__ import annotations

import itertools

import pytest
import torch

from cvg_kernels.guidance.flow_graph import Group, flow_of

FRAMES, ROWS, COLUMNS = 3, 1, 2
PLACES = ROWS * COLUMNS


def drawn() -> dict[str, torch.Tensor]:
    """Maps of a text layer, of attention within frames, and of two temporal layers."""
    return {
        "cross": torch.rand(1, 2, FRAMES, ROWS, COLUMNS, dtype=torch.float64),
        "spatial": torch.rand(1, FRAMES, PLACES, PLACES, dtype=torch.float64).softmax(-1),
        "first": torch.rand(1, PLACES, FRAMES, FRAMES, dtype=torch.float64).softmax(-1),
        "second": torch.rand(1, PLACES, FRAMES, FRAMES, dtype=torch.float64).softmax(-1),
    }


def edges(maps, spatial: bool):
    """Every path from a word to a frame's place: the edges on it, skip connections mixed in."""
    average = lambda value, same: (value + same) / 2
    hops = [maps["first"][0], maps["second"][0]]
    for start, middle, end in itertools.product(range(FRAMES), repeat=3):
        for place, come in itertools.product(range(PLACES), repeat=2):
            if come != place and not spatial:
                continue
            along = [average(hops[0][place, middle, start], middle == start)]
            along += [average(hops[1][place, end, middle], end == middle)]
            if spatial:
                along += [average(maps["spatial"][0, start, place, come], place == come)]
            yield start, come, end, place, along


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("form", ["rollout", "hard"])
def test_against_the_paths_one_by_one(form, spatial):
    """A product sums over paths the product of their edges; the hard form takes the widest path's narrowest edge."""
    maps = drawn()
    expected = torch.zeros(1, 2, FRAMES, PLACES, dtype=torch.float64)
    for start, come, end, place, along in edges(maps, spatial):
        begin = maps["cross"].flatten(3)[0, :, start, come]
        known = expected[0, :, end, place]
        if form == "rollout":
            known += begin * torch.stack(along).prod()
        else:
            torch.maximum(known, torch.minimum(begin, torch.stack(along).min()), out=known)
    group = Group("cross", ("first", "second"), "spatial" if spatial else None)
    flow = flow_of(group, maps, form, 0.01, "tokens_first", "average", "reference")
    torch.testing.assert_close(flow, expected.unflatten(-1, (ROWS, COLUMNS)))


def test_rollout_keeps_what_comes_in():
    """Rows that sum to one pass even attention on as it is; without a temporal layer nothing changes."""
    maps = drawn() | {"cross": torch.full((1, 1, FRAMES, ROWS, COLUMNS), 0.25, dtype=torch.float64)}
    for group in (Group("cross", ("first", "second"), "spatial"), Group("cross")):
        flow = flow_of(group, maps, "rollout", 0.01, "tokens_first", "average", "auto")
        torch.testing.assert_close(flow, maps["cross"])


def test_gradients_of_rollout():
    maps = {name: map.requires_grad_() for name, map in drawn().items()}
    names = list(maps)
    group = Group("cross", ("first", "second"), "spatial")
    assert torch.autograd.gradcheck(
        lambda *given: flow_of(
            group, dict(zip(names, given, strict=True)), "rollout", 0.01, "tokens_first", "average", "auto"
        ),
        tuple(maps.values()),
    )
