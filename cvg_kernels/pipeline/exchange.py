"""Methods of an object exchanged for a while, so that copies of it, and whatever else is done to it,
are not touched.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_SLOT = "_cvg_exchange"
STOCK = "_cvg_stock_class"  # of a derived class: the one that it stands for

Methods = dict[str, Callable[..., Any]]


def exchange(target: Any, methods: Methods) -> Callable[[], None]:
    """Puts functions in the place of an object's methods, until what it returns is called.

    A method that only the class has is found through the class by Python (`__call__`), and a function that is set on
    the object would go with its copies, and act for the original. A derived class has neither fault: copies have the
    stock one. Of several exchanges the last stands outermost; they may end in any order.

    Args:
        target: the object.
        methods: name → function `(stock, *args, **kwargs)`, where `stock` is the bound method in whose place it
            stands.

    Returns:
        What puts the object back as it was; more than once does no harm.
    """
    held = vars(target).get(_SLOT)
    if held is None or held.target() is not target:
        held = vars(target)[_SLOT] = _Exchanged(target)
    held.add(methods)
    return functools.partial(held.remove, methods)


class _Exchanged:
    """All that stands in the place of one object's methods."""

    def __init__(self, target: Any) -> None:
        self.target = weakref.ref(target)
        self.derived = type(target)
        self.stack: list[Methods] = []  # the outermost last
        self.own: dict[str, Any] = {}  # attributes of the object itself that hid those of its class

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()  # a copy has none

    def add(self, methods: Methods) -> None:
        """Puts some functions outermost."""
        target = self.target()
        self.stack.append(methods)
        self.own |= {name: vars(target).pop(name) for name in methods if name in vars(target)}
        self._derive(target)

    def remove(self, methods: Methods) -> None:
        """Takes them away; with the last ones the object has its class and its own attributes back."""
        target = self.target()
        if target is None or not any(one is methods for one in self.stack):
            return
        self.stack = [one for one in self.stack if one is not methods]
        for name in self.own.keys() - set().union(*self.stack):
            vars(target).setdefault(name, self.own.pop(name))  # or one that was set meanwhile
        if not self.stack:
            del vars(target)[_SLOT]
        if type(target) is self.derived:  # else somebody has set another class
            self._derive(target)

    def reached(self, name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
        """What a call of a method gets to."""
        reached = self.own.get(name, stock)
        for methods in self.stack:
            if name in methods:
                reached = functools.partial(methods[name], reached)
        return reached

    def _derive(self, target: Any) -> None:
        """Gives the object the class that its methods need."""
        kind = getattr(type(target), STOCK, type(target))
        names = sorted(set().union(*self.stack))
        self.derived = _derived(kind, names) if names else kind
        object.__setattr__(target, "__class__", self.derived)


def _derived(kind: type, names: list[str]) -> type:
    """A class that looks like another one and whose methods of some names go to what was exchanged."""

    def __reduce_ex__(self: Any, protocol: int) -> Any:
        held = vars(self).get(_SLOT)
        return plain(self, kind, {} if held is None else held.own).__reduce_ex__(1)

    members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, STOCK: kind}
    members |= {name: _through(kind, name) for name in names}
    return type(kind.__name__, (kind,), {**members, "__reduce_ex__": __reduce_ex__})


def _through(kind: type, name: str) -> Callable[..., Any]:
    stock = getattr(kind, name)

    @functools.wraps(stock)  # pipelines look at signatures for what they may pass
    def method(self: Any, *args: Any, **kwargs: Any):
        held, call = vars(self).get(_SLOT), functools.partial(stock, self)
        if held is not None and held.target() is self:  # else a copy that the class has made itself
            call = held.reached(name, call)
        return call(*args, **kwargs)

    return method


def plain(held: Any, kind: type, own: dict[str, Any]) -> Any:
    """An object as it is to be copied and pickled: of the class that it was, without what we keep on it.

    Args:
        held: the object.
        kind: its class without ours.
        own: attributes that it had in the place of ours.
    """
    copy = object.__new__(kind)
    kept = {name: value for name, value in vars(held).items() if not name.startswith("_cvg")}
    object.__setattr__(copy, "__dict__", {**own, **kept})
    return copy


@contextmanager
def replaced_forwards(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Gives modules another forward, on the instances only, and puts the old ones back, whatever happens.

    Args:
        forwards: module → its forward in the block.
    """
    own = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, before in own.items():
            if before is None:
                vars(module).pop("forward", None)
            else:
                module.forward = before


class Listener:
    """A hook of a module; in a copy of the module it does nothing."""

    def __init__(self, heard: Callable[..., Any]) -> None:
        self._heard = heard

    def __call__(self, *args: Any) -> Any:
        """Hands a call on."""
        return self._heard(*args)

    def __reduce__(self) -> tuple:
        return Listener, (_deaf,)


def _deaf(*args: Any) -> None:
    """Does nothing."""
