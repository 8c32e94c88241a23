"""The tokens of several prompts as tensors."""

from __future__ import annotations

import pytest
import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.prompts.token_table import TokenTable
from cvg_kernels.prompts.tokens import TokenSpan, check_reach

CAT, DOG = TokenSpan("cat", 0, (3,)), TokenSpan("dog", 1, (7, 8))
BOTH = TokenSpan("cat dog", 0, (3, 7, 8))
SPANS = [[CAT, DOG, BOTH], [DOG]]


def test_layout():
    table = TokenTable.of(SPANS)
    assert table.ids.tolist() == [[3, 7, 8], [7, 8, 7]]
    assert table.real.tolist() == [[True] * 3, [True, True, False]]
    assert table.present.tolist() == [[True] * 3, [True, False, False]]
    assert table.labels == (("cat", "dog#1", "cat dog"), ("dog#1",))
    assert table.membership.tolist() == [[[1, 0, 0], [0, 1, 1], [1, 1, 1]], [[1, 1, 0], [0, 0, 0], [0, 0, 0]]]


def test_among_all_tokens_of_the_prompt():
    table = TokenTable.of([[DOG]], among=[range(1, 10)])
    assert table.ids.tolist() == [list(range(1, 10))]
    assert table.membership.tolist() == [[[0, 0, 0, 0, 0, 0, 1, 1, 0]]]
    with pytest.raises(ArgumentError, match=r"among must hold the tokens \(7, 8\) of 'dog#1'"):
        TokenTable.of([[DOG]], among=[range(1, 8)])


@pytest.mark.parametrize("heads", [(), (4,)])
def test_sums(heads):
    table = TokenTable.of(SPANS)
    maps = torch.randn(2, *heads, 3, 2, 3, 5, dtype=torch.float64)
    expected = torch.einsum("bkt,b...tfhw->b...kfhw", table.membership.double(), maps)
    torch.testing.assert_close(table.by_word(maps), expected)


def test_another_axis():
    table = TokenTable.of(SPANS)
    scores = torch.randn(2, 3, dtype=torch.float64)
    expected = torch.einsum("bkt,bt->bk", table.membership.double(), scores)
    torch.testing.assert_close(table.by_word(scores, dim=1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_float32_under_autocast(dtype):
    table = TokenTable.of([[BOTH]])
    maps = torch.rand(1, 3, 2, 4, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        summed = table.by_word(maps)
    assert summed.dtype == torch.float32
    # Two additions in float32: each is off by half a unit in the last place of a sum below 3.
    exact = maps.double().sum(1, keepdim=True)
    torch.testing.assert_close(summed.double(), exact, rtol=0, atol=2 * 2**-23)


def test_padding_takes_no_part():
    """What stands at columns of no word, even what is no number, is not in the sums, nor has it a gradient."""
    table = TokenTable.of([[CAT, DOG], [CAT]])
    maps = torch.rand(2, 3, 1, 2, 2)
    maps[1, 1:] = torch.nan
    maps.requires_grad_()
    summed = table.by_word(maps)
    assert (summed[1, 1] == 0).all()
    (gradient,) = torch.autograd.grad(summed.sum(), maps)
    assert torch.equal(gradient[0], torch.ones(3, 1, 2, 2))
    assert torch.equal(gradient[1], torch.tensor([1.0, 0, 0])[:, None, None, None].expand(3, 1, 2, 2))


def test_gradients_add_up():
    table = TokenTable.of(SPANS)
    maps = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(table.by_word, maps)


def test_the_largest_of_a_word():
    table = TokenTable.of(SPANS)
    values = torch.randn(2, 3)
    largest = table.largest_by_word(values)
    assert largest[0].tolist() == [values[0, 0], values[0, 1:].max(), values[0].max()]
    assert largest[1].tolist() == [values[1, :2].max(), -torch.inf, -torch.inf]


def test_branches():
    table = TokenTable.of(SPANS).repeat(2)
    assert table.ids.tolist() == [[3, 7, 8], [7, 8, 7]] * 2
    assert len(table.labels) == 4
    maps = torch.randn(4, 3, 1, 2, 2)
    one = TokenTable.of(SPANS)
    expected = torch.cat([one.by_word(maps[:2]), one.by_word(maps[2:])])
    assert torch.equal(table.by_word(maps), expected)


def test_a_device():
    table = TokenTable.of(SPANS).to("meta")
    assert {table.ids.device.type, table.membership.device.type} == {"meta"}
    check_reach(table.ids, 1)  # trusted there


@pytest.mark.parametrize("shape", [(2, 4, 1, 2, 2), (3, 3, 1, 2, 2)])
def test_maps_of_other_tokens(shape):
    with pytest.raises(ArgumentError, match=r"maps must have 2 sample\(s\) and, on axis 1, 3 token"):
        TokenTable.of(SPANS).by_word(torch.rand(shape))


def test_reach():
    check_reach(TokenTable.of(SPANS).ids, 9)
    with pytest.raises(ArgumentError, match="token 8 lies beyond the 8 tokens of text"):
        check_reach(TokenTable.of(SPANS).ids, 8)
