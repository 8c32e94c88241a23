"""Methods of an object exchanged for a while: copies, own attributes, several exchanges left in any order."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle

import pytest
import torch
from torch import nn

from cvg_kernels.pipeline.exchange import exchange, replaced_forwards


class Counter:
    """Counts up; stands for a scheduler or a pipeline."""

    def __init__(self) -> None:
        self.count = 0
        self.notes = []

    def step(self, by: int = 1) -> int:
        """Counts."""
        self.count += by
        return self.count

    def __call__(self, *, times: int) -> int:
        return self.count * times


def times_ten(stock, *args, **kwargs):
    return 10 * stock(*args, **kwargs)


def plus_one(stock, *args, **kwargs):
    return stock(*args, **kwargs) + 1


def own_step(by: int = 1) -> str:
    return "own" * by


def test_the_function_stands_in_the_methods_place():
    """Also of one that Python looks up on the class, and pipelines see the signature of the stock one."""
    target = Counter()
    before = dict(vars(target))
    restore = exchange(target, {"step": times_ten, "__call__": plus_one})
    assert target.step(2) == 20 and target.step(by=1) == 30 and target(times=4) == 13
    assert isinstance(target, Counter) and type(target) is not Counter
    assert type(target).__name__ == "Counter" and type(target).__module__ == __name__
    assert inspect.signature(target.step) == inspect.signature(Counter().step)
    assert inspect.signature(target.__call__) == inspect.signature(Counter().__call__)
    assert target.step.__doc__ == "Counts."
    other = Counter()
    assert other.step() == 1 and type(other) is Counter
    restore()
    assert type(target) is Counter and vars(target) == {**before, "count": 3}
    assert target.step() == 4 and target(times=2) == 8


def test_more_than_one_restore_does_no_harm():
    target = Counter()
    restore = exchange(target, {"step": times_ten})
    restore()
    again = exchange(target, {"step": plus_one})
    restore()
    assert target.step() == 2
    again()
    assert type(target) is Counter and target.step() == 2


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda target: pickle.loads(pickle.dumps(target))}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_a_stock_object(kind):
    target = Counter()
    restore = exchange(target, {"step": times_ten, "__call__": plus_one})
    made = COPIES[kind](target)
    assert type(made) is Counter and vars(made).keys() == {"count", "notes"}
    assert (made.notes is target.notes) == (kind == "copy")
    assert made.step() == 1 and made(times=5) == 5
    assert target.step() == 10  # counts apart from its copy, and is exchanged as before
    other = exchange(made, {"step": plus_one})
    assert made.step() == 3 and target.step() == 20
    restore()
    assert made.step() == 4 and target.step() == 3
    other()
    assert type(made) is Counter and made.step() == 4


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_has_the_own_attributes_of_the_object(kind):
    target = Counter()
    target.step = own_step
    restore = exchange(target, {"step": plus_one})
    made = COPIES[kind](target)
    assert made.step(2) == "ownown" and vars(made)["step"] is own_step
    restore()
    assert vars(target)["step"] is own_step


def test_a_class_that_copies_itself():
    """Its copies have whatever was on the object; they are stock in what they do."""

    class Copied(Counter):
        def __copy__(self):
            made = type(self).__new__(type(self))
            vars(made).update(vars(self))
            return made

        def __deepcopy__(self, memo):
            made = type(self).__new__(type(self))
            vars(made).update(copy.deepcopy(vars(self), memo))
            return made

    target = Copied()
    restore = exchange(target, {"step": times_ten})
    for made in (copy.copy(target), copy.deepcopy(target)):
        assert made.step() == 1
        other = exchange(made, {"step": plus_one})
        assert made.step() == 3
        other()
        assert type(made) is Copied and made.step() == 3
    assert target.step() == 10
    restore()
    assert type(target) is Copied


def test_an_own_attribute_is_the_stock_one_and_comes_back():
    """As a spy or another package's patch sits on the object."""
    target = Counter()
    target.step = lambda by=1: Counter.step(target, 100 * by)
    own = target.step
    restore = exchange(target, {"step": plus_one})
    assert target.step() == 101 and "step" not in vars(target)
    restore()
    assert vars(target)["step"] is own and target.step() == 200


def test_what_is_set_meanwhile_stays():
    target = Counter()
    target.step = own_step
    restore = exchange(target, {"step": plus_one})
    target.step = later = lambda by=1: "later"
    target.more = 1
    assert target.step() == "later" and copy.copy(target).step is later
    restore()
    assert target.step is later and target.more == 1
    del target.step
    assert target.step() == 1


ORDERS = list(itertools.permutations(range(3)))


@pytest.mark.parametrize("own", [False, True], ids=["", "own attribute"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_exchanges_end_in_any_order(order, own):
    """The last one stands outermost; those that are left go on, and with the last the object is as it was."""
    target = Counter()
    if own:
        target.step = lambda by=1: Counter.step(target, by)
    attributes = dict(vars(target))
    functions = [times_ten, plus_one, lambda stock, by=1: -stock(by)]
    restores = [
        exchange(target, {"step": functions[0]}),
        exchange(target, {"step": functions[1], "__call__": plus_one}),
        exchange(target, {"step": functions[2]}),
    ]
    there = [0, 1, 2]
    for leaving in (*order, None):
        target.count = 0
        wanted = 3
        for number in there:
            wanted = functions[number](lambda by, wanted=wanted: wanted, 3)
        assert target.step(3) == wanted
        assert target(times=2) == 6 + (1 in there)
        if leaving is not None:
            restores[leaving]()
            there.remove(leaving)
    assert type(target) is Counter and vars(target) == {**attributes, "count": 3}


def test_a_class_that_was_set_meanwhile_stays():
    class Other(Counter):
        pass

    target = Counter()
    restore = exchange(target, {"step": times_ten})
    target.__class__ = Other
    restore()
    assert type(target) is Other and vars(target) == {"count": 0, "notes": []}


def test_an_error_in_the_method_changes_nothing():
    target = Counter()

    def fail(stock, *args):
        raise KeyboardInterrupt

    restore = exchange(target, {"step": fail})
    with pytest.raises(KeyboardInterrupt):
        target.step()
    restore()
    assert type(target) is Counter and target.step() == 1


def test_forwards_are_replaced_for_a_block():
    """A forward that somebody put on an instance is there again afterwards; the class is not touched."""
    plain, patched, x = nn.Linear(2, 2), nn.Linear(2, 2), torch.randn(3, 2)

    def own(x):
        return x + 1

    patched.forward = own
    stock = plain(x)
    with pytest.raises(ZeroDivisionError), replaced_forwards({plain: lambda x: x, patched: lambda x: -x}):
        assert torch.equal(plain(x), x) and torch.equal(patched(x), -x)
        raise ZeroDivisionError
    assert torch.equal(plain(x), stock) and "forward" not in vars(plain)
    assert patched.forward is own
