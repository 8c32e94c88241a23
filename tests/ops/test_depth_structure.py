"""depth_structure against the same by convolution, its shapes, and what detail it leaves."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d, interpolate, pad

import cvg_kernels as cvg


def by_convolution(depth, rounds):
    """The same with a 3×3 kernel, reflection padding and a stride; only for sides that stay above 1 pixel."""
    taps = torch.tensor([1.0, 2.0, 1.0], dtype=depth.dtype) / 4
    kernel = (taps[:, None] * taps)[None, None]
    maps = depth.flatten(0, 1)[:, None]
    for _ in range(rounds):
        maps = conv2d(pad(maps, (1,) * 4, mode="reflect"), kernel, stride=2)
    return interpolate(maps, depth.shape[2:], mode="bilinear")[:, 0].view(depth.shape)


@pytest.mark.parametrize("size, rounds", [((16, 24), 1), ((16, 24), 3), ((13, 9), 2), ((13, 9), 3), ((2, 2), 1)])
def test_against_a_convolution(size, rounds):
    depth = torch.rand(2, 3, *size, dtype=torch.float64)
    with cvg.trace_backends() as ran:
        found = cvg.depth_structure(depth, rounds)
    assert ran == [("depth_structure", "reference")]
    torch.testing.assert_close(found, by_convolution(depth, rounds))


def test_rounds_per_sample():
    depth = torch.rand(4, 2, 12, 10)
    found = cvg.depth_structure(depth, torch.tensor([0, 3, 1, 9]))
    assert torch.equal(found[0], depth[0])
    for sample, rounds in ((1, 3), (2, 1), (3, 9)):
        alone = cvg.depth_structure(depth[sample : sample + 1], rounds)
        torch.testing.assert_close(found[sample : sample + 1], alone)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (6, 4)])
def test_never_below_one_pixel(size):
    """At the end nothing but one number is left, the same everywhere; a constant stays what it is throughout."""
    depth = torch.rand(1, 2, *size)
    flat = cvg.depth_structure(depth, 12)
    torch.testing.assert_close(flat, flat[..., :1, :1].expand_as(flat))
    for rounds in (1, 2, 12):
        constant = cvg.depth_structure(torch.full((1, 2, *size), 0.3), rounds)
        torch.testing.assert_close(constant, torch.full_like(constant, 0.3))


def test_every_round_takes_detail():
    depth = torch.rand(1, 3, 64, 64)
    levels = [cvg.depth_structure(depth, rounds) for rounds in range(7)]
    spread = [level.std().item() for level in levels]
    assert spread == sorted(spread, reverse=True) and spread[-1] < 0.1 * spread[0]
    assert torch.equal(levels[0], depth)
    assert [level.shape for level in levels] == [depth.shape] * 7


def test_frames_and_samples_do_not_see_each_other():
    depth = torch.rand(2, 3, 8, 8)
    changed = depth.clone()
    changed[1, 2] += 1
    difference = cvg.depth_structure(changed, 2) - cvg.depth_structure(depth, 2)
    assert difference[1, 2].abs().min() > 0.5
    difference[1, 2] = 0
    assert not difference.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype):
    depth = torch.rand(1, 2, 9, 9).to(dtype)
    found = cvg.depth_structure(depth, 3)
    assert torch.equal(found, cvg.depth_structure(depth.float(), 3).to(dtype))


def test_gradients():
    depth = torch.rand(2, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    rounds = torch.tensor([0, 2])
    assert torch.autograd.gradcheck(lambda d: cvg.depth_structure(d, rounds), depth)
    assert torch.autograd.gradgradcheck(lambda d: cvg.depth_structure(d, rounds), depth)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"depth": torch.rand(2, 3, 4)}, r"depth must be floating point \[B, F, h, w\]"),
        ({"depth": torch.ones(1, 1, 2, 2).int()}, "depth must be floating point"),
        ({"depth": torch.rand(1, 2, 0, 3)}, "without empty maps"),
        ({"t_s": -1}, "t_s must not be negative, got -1"),
        ({"t_s": 1.5}, "t_s must be an integer or an integer tensor"),
        ({"t_s": True}, "t_s must be an integer or an integer tensor"),
        ({"t_s": torch.tensor([1, 2])}, r"t_s must be a number or integers \[B\] = \(1,\)"),
        ({"t_s": torch.tensor([1.0])}, r"integers \[B\] = \(1,\), got torch.float32"),
        ({"t_s": torch.zeros(1, dtype=torch.complex64)}, r"integers \[B\] = \(1,\), got torch.complex64"),
        ({"t_s": torch.zeros(1, dtype=torch.uint16)}, r"integers \[B\] = \(1,\), got torch.uint16"),
        ({"t_s": torch.tensor([-2])}, "t_s must not be negative"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(cvg.ArgumentError, match=message):
        cvg.depth_structure(**({"depth": torch.rand(1, 2, 4, 4), "t_s": 1} | change))


def test_other_backends_say_that_they_are_not_there():
    with pytest.raises(cvg.BackendUnavailableError, match="depth_structure has no native kernel"):
        cvg.depth_structure(torch.rand(1, 1, 2, 2), 1, backend="native")


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5)])
def test_no_depth_at_all(shape):
    depth = torch.rand(shape, requires_grad=True)
    found = cvg.depth_structure(depth, 2)
    assert found.shape == depth.shape
    (grad,) = torch.autograd.grad(found.sum(), depth)
    assert grad.shape == depth.shape
