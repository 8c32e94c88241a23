"""Methods of an object exchanged for a while, so that copies of it, and whatever else is done to it, are not touched."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_SLOT = "_cvg_exchange"


class _Methods:
    """What the methods of one object go to; those of a copy of it go to its class."""

    def __init__(
        self, target: Any, methods: dict[str, Callable[..., Any]], own: dict[str, Any]
    ) -> None:
        self.target = weakref.ref(target)
        self.methods = methods
        self.own = own  # attributes of the object itself that hid those of its class

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()  # a copy has none


def exchange(target: Any, methods: dict[str, Callable[..., Any]]) -> Callable[[], None]:
    """Puts functions in the place of an object's methods, until what it returns is called.

    A method that only the class has is found through the class by Python (`__call__`), and a function that is set on the
    object would go with its copies, and act for the original. A derived class has neither fault.

    Args:
        target: the object.
        methods: name → function `(stock, *args, **kwargs)`, where `stock` is the bound method in whose place it stands.

    Returns:
        What puts the object back as it was.
    """
    kind = type(target)
    own = {name: vars(target)[name] for name in methods if name in vars(target)}
    for name in own:
        del vars(target)[name]
    vars(target)[_SLOT] = _Methods(target, methods, own)
    derived = _derived(kind, tuple(methods))
    object.__setattr__(target, "__class__", derived)

    def restore() -> None:
        held = vars(target).pop(_SLOT, None)
        if type(target) is derived:
            object.__setattr__(target, "__class__", kind)
        if held is not None:
            for name, value in held.own.items():
                vars(target).setdefault(name, value)

    return restore


def _derived(kind: type, names: tuple[str, ...]) -> type:
    def __reduce_ex__(self: Any, protocol: int) -> Any:
        held = vars(self).get(_SLOT)
        return plain(self, kind, {} if held is None else held.own).__reduce_ex__(1)

    members = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__reduce_ex__": __reduce_ex__,
    }
    for name in names:
        members[name] = _through(kind, name)
    return type(kind.__name__, (kind,), members)


def _through(kind: type, name: str) -> Callable[..., Any]:
    stock = getattr(kind, name)

    @functools.wraps(stock)  # pipelines look at signatures for what they may pass
    def method(self: Any, *args: Any, **kwargs: Any):
        held = vars(self).get(_SLOT)
        bound = functools.partial(stock, self)
        if held is None or held.target() is not self:
            return bound(*args, **kwargs)
        own = held.own.get(name)
        return held.methods[name](bound if own is None else own, *args, **kwargs)

    return method


def plain(held: Any, kind: type, own: dict[str, Any]) -> Any:
    """An object as it is to be copied and pickled: of the class that it was, without what we keep on it.

    Args:
        held: the object.
        kind: its class without ours.
        own: attributes that it had in the place of ours.
    """
    made = object.__new__(kind)
    kept = {name: value for name, value in vars(held).items() if not name.startswith("_cvg")}
    object.__setattr__(made, "__dict__", {**kept, **own})
    return made


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
        return self._heard(*args)

    def __reduce__(self) -> tuple:
        return Listener, (_deaf,)


def _deaf(*args: Any) -> None:
    """Does nothing."""
