"""Compiled denoisers: what listens runs before and after their graphs, what takes part in layers runs within them.

A graph knows nothing of hooks that come later, and one that looked at what changes from step to step would be compiled
anew at each. So an `_Entrance` stands before every compiled module for the length of a run: there hooks run as ever,
taps are asked what they want, and are handed what the graph has left for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from cvg_kernels.pipeline.exchange import Listener
from cvg_kernels.pipeline.layers import Layer
from cvg_kernels.pipeline.models import unwrap
from cvg_kernels.pipeline.taps import collect, decide

_log = logging.getLogger("cvg_kernels")

#: `(denoiser, args, kwargs)` → `None`, or others; as a forward pre-hook.
Before = Callable[[nn.Module, tuple, dict[str, Any]], Any]
#: `(denoiser, args, output)` → `None`, or another; as a forward hook. After a failed call the output is `None`.
After = Callable[[nn.Module, tuple, Any], Any]


@contextmanager
def hearing(denoiser: nn.Module, before: Before, after: After | None = None) -> Iterator[None]:
    """Hears the calls of a network, outside of any graph.

    Args:
        denoiser: as the pipeline has it, perhaps compiled or in a wrapper.
        before: is told of a call: of the network, or of the compiled module around it, which is what a method calls
            too.
        after: is told of its end, also if it failed.
    """
    network = unwrap(denoiser)
    with ExitStack() as stack:
        for module in _compiled_modules(denoiser):
            if any(part is network for part in module.modules()):
                entrance = stack.enter_context(_entrance(module))
                listener = (before, after)
                entrance.listeners.append(listener)
                stack.callback(_remove, entrance.listeners, listener)
                break
        else:
            hook = network.register_forward_pre_hook(Listener(before), with_kwargs=True)
            stack.callback(hook.remove)
            if after is not None:
                hook = network.register_forward_hook(Listener(after), always_call=True)
                stack.callback(hook.remove)
        yield


@contextmanager
def taking_part(denoiser: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """Serves the taps of some layers where the layers are compiled.

    Args:
        denoiser: as the pipeline has it.
        layers: with taps.
    """
    with ExitStack() as stack:
        for module in _compiled_modules(denoiser):
            parts = {id(part) for part in module.modules()}
            within = [layer for layer in layers if id(layer.module) in parts]
            if within:
                entrance = stack.enter_context(_entrance(module))
                entrance.layers.append(within)
                stack.callback(_remove, entrance.layers, within)
        yield


@contextmanager
def uncompiled(denoiser: nn.Module, touched: Sequence[nn.Module], *, say: bool = True) -> Iterator[None]:
    """Runs the compiled parts of a denoiser as they were written, where they contain what is touched.

    For changes that a graph would not see: hooks on parts of it, other forwards. Blocks without any stay compiled.

    Args:
        denoiser: as the pipeline has it, perhaps the result of `torch.compile`.
        touched: modules with hooks or other forwards; nothing else is.
        say: whether to say so in the log.
    """
    wanted = {id(module) for module in touched}
    with ExitStack() as stack:
        names = []
        for name, module in _compiled_modules(denoiser, names=True):
            if any(id(part) in wanted for part in module.modules()):
                names.append(name or type(unwrap(module)).__name__)
                entrance = stack.enter_context(_entrance(module))
                entrance.closed += 1
                stack.callback(entrance.open_again)
        if names and say:
            _log.warning(
                "%s compiled; while attached to, it runs uncompiled",
                f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} other modules are",
            )
        yield


def _compiled_modules(denoiser: nn.Module, names: bool = False) -> list:
    """The compiled modules of a denoiser, from the outside inwards, perhaps with their names."""
    return [
        (name, module) if names else module
        for name, module in denoiser.named_modules()
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
    ]


def _remove(entries: list, entry: Any) -> None:
    """Takes out this very entry, and none that equals it."""
    entries[:] = [one for one in entries if one is not entry]


class _Entrance:
    """Stands in the place of what `torch.compile` has made of a module, and calls that.

    Args:
        module: compiled in place, or a wrapper that `torch.compile` has made.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.wraps = hasattr(module, "_orig_mod")
        self.compiled = module.forward if self.wraps else module._compiled_call_impl
        self.users = 0  # who needs it
        self.closed = 0  # who wants the module as it was written
        self.listeners: list[tuple[Before, After | None]] = []
        self.layers: list[list[Layer]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the module."""
        if torch.compiler.is_compiling():  # as a part of another compiled module
            return self.compiled(*args, **kwargs)
        heard, output = [], None
        try:
            for listener in tuple(self.listeners):
                heard.append(listener)
                changed = listener[0](self.module, args, kwargs)
                args, kwargs = (args, kwargs) if changed is None else changed
            output = self._call(args, kwargs)
        finally:
            for _, after in heard:
                changed = None if after is None else after(self.module, args, output)
                output = output if changed is None else changed
        return output

    def _call(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.closed:
            stock = self.module._orig_mod if self.wraps else self.module._call_impl
            return stock(*args, **kwargs)
        layers = list({id(one.module): one for some in self.layers for one in some}.values())
        decide(layers)
        output = self.compiled(*args, **kwargs)
        collect(layers)
        return output

    def open_again(self) -> None:
        """Ends one `closed`."""
        self.closed -= 1

    def set(self, function: Any) -> None:
        """Puts something in the place of the compiled function."""
        if self.wraps:
            vars(self.module)["forward"] = function
        else:
            self.module._compiled_call_impl = function

    def stands(self) -> bool:
        """Whether nobody has compiled the module anew meanwhile."""
        own = vars(self.module)
        return own.get("forward" if self.wraps else "_compiled_call_impl") is self


@contextmanager
def _entrance(module: nn.Module) -> Iterator[_Entrance]:
    """The entrance of a compiled module, made by the first who needs it and gone with the last."""
    own = vars(module).get("forward" if hasattr(module, "_orig_mod") else "_compiled_call_impl")
    entrance = own if isinstance(own, _Entrance) else _Entrance(module)
    if entrance is not own:
        entrance.set(entrance)
    entrance.users += 1
    try:
        yield entrance
    finally:
        entrance.users -= 1
        if not entrance.users and entrance.stands():
            entrance.set(entrance.compiled)
