"""How the memory of a scheduler moves with the latents: earlier predictions, derivatives, a corrector's sample."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.exchange import STOCK

# The corrector of UniPC and Helios, and that of SA-Solver.
_CORRECTORS = ("multistep_uni_c_bh_update", "stochastic_adams_moulton_update")
# The list of earlier derivatives of LMS, and that of IPNDM.
_LISTS = ("derivatives", "ets")


def moved(tensor: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Adds a change in float32 or better; returns the tensor's dtype."""
    dtype = torch.promote_types(tensor.dtype, change.dtype)
    return (tensor.to(dtype) + change).to(tensor.dtype)


def output_change(scheduler: Any, arguments: dict[str, Any], shift: torch.Tensor) -> torch.Tensor | None:
    """By how much the converted model output changes when the sample moves by `shift`; None before the first step.

    `convert_model_output` is linear in (model output, sample), so the change is what it makes of (0, shift). Clipping
    (`thresholding`) is not linear: there it is the difference of two conversions.
    """
    if all(output is None for output in scheduler.model_outputs):
        return None
    output, sample = arguments["model_output"].to(shift.dtype), arguments["sample"].to(shift.dtype)
    if getattr(scheduler.config, "thresholding", False):
        before = scheduler.convert_model_output(output, sample=sample)
        return scheduler.convert_model_output(output, sample=sample + shift) - before
    return scheduler.convert_model_output(torch.zeros_like(output), sample=shift)


def prediction_change(step: Callable[..., Any], arguments: dict[str, Any], shift: torch.Tensor) -> torch.Tensor:
    """By how much the x₀ that CogVideoX's multistep scheduler predicts changes when the sample moves by `shift`.

    Its step is linear too and keeps nothing: the prediction from a model output of 0 at the sample `shift`. The noise
    that the step draws comes from a generator of its own.
    """
    probe = {
        **arguments,
        "model_output": torch.zeros_like(arguments["model_output"], dtype=shift.dtype),
        "sample": shift,
        "old_pred_original_sample": None,
        "timestep_back": None,
        "generator": torch.Generator(shift.device),
        "return_dict": False,
    }
    return step(**probe)[1]


@contextmanager
def list_moved(scheduler: Any, arguments: dict[str, Any], shift: torch.Tensor) -> Iterator[None]:
    """Moves the remembered derivatives by the change of the one that the step inside will add."""
    name = next(name for name in _LISTS if hasattr(scheduler, name))
    before = getattr(scheduler, name)
    if before:
        # The step is linear in (model output, sample): the derivative from (0, shift), on a copy without a memory.
        probe = copy.copy(scheduler)
        setattr(probe, name, [])
        output = torch.zeros_like(arguments["model_output"], dtype=shift.dtype)
        type(scheduler).step(probe, **{**arguments, "model_output": output, "sample": shift})
        change = getattr(probe, name)[-1]
        setattr(scheduler, name, [moved(derivative, change) for derivative in before])
    try:
        yield
    except BaseException:
        setattr(scheduler, name, before)
        raise


@contextmanager
def corrector_moved(scheduler: Any, change: torch.Tensor | None, shift: torch.Tensor) -> Iterator[None]:
    """Moves the remembered outputs by `change`, and the result of a corrector by `shift`, for the step inside.

    The corrector goes back to the sample of the step before. It is given what was there before the move, so that it
    corrects as much as it would have, and its result is moved.
    """
    before = scheduler.model_outputs
    if change is None:
        yield
        return
    name = next((name for name in _CORRECTORS if hasattr(scheduler, name)), None)
    own = vars(scheduler).get(name)

    def corrector(this_model_output: torch.Tensor, **others: Any) -> torch.Tensor:
        outputs, scheduler.model_outputs = scheduler.model_outputs, before
        try:
            corrected = stock(this_model_output=moved(this_model_output, -change), **others)
        finally:
            scheduler.model_outputs = outputs
        return moved(corrected, shift)

    scheduler.model_outputs = [None if output is None else moved(output, change) for output in before]
    if name is not None:
        stock = getattr(scheduler, name)
        setattr(scheduler, name, corrector)
    try:
        yield
    except BaseException:
        scheduler.model_outputs = before
        raise
    finally:
        if name is not None and own is None:
            delattr(scheduler, name)
        elif name is not None:
            setattr(scheduler, name, own)


class OwnMemory:
    """What a scheduler of somebody's own keeps from call to call, beside what the class of diffusers under it does.

    Args:
        scheduler: as it is before its first step.
    """

    def __init__(self, scheduler: Any) -> None:
        self._before = _own_tensors(scheduler)

    def check(self, scheduler: Any) -> None:
        """Checks that nothing has been kept since: it would belong to latents that nobody moved.

        Raises:
            ArgumentError: naming what has.
        """
        now = _own_tensors(scheduler)
        kept = [name for name, tensors in now.items() if tensors != self._before.get(name)]
        if kept:
            raise ArgumentError(
                f"scheduler {type(scheduler).__name__}: latents cannot be moved: its own `step` keeps "
                f"{', '.join(kept)} "
                "from call to call, which belongs to latents that nobody moved; use a scheduler of diffusers"
            )


def _own_tensors(scheduler: Any) -> dict[str, list[tuple[int, int]]]:
    """Attributes that hold tensors and are unknown to the classes of diffusers → which tensors,
    and how often written.
    """
    kinds = [kind for kind in type(scheduler).__mro__ if STOCK not in vars(kind)]
    if kinds[0].__module__.startswith("diffusers."):
        return {}
    known: set[str] = set()
    for kind in kinds:
        if kind.__module__.startswith("diffusers."):
            codes = (getattr(inspect.unwrap(f), "__code__", None) for f in vars(kind).values() if callable(f))
            known.update(*(code.co_names for code in codes if code is not None))
    return {
        name: [(tensor.data_ptr(), tensor._version) for tensor in tree_leaves(value) if torch.is_tensor(tensor)]
        for name, value in vars(scheduler).items()
        if name not in known and not name.startswith("_cvg")
    }
