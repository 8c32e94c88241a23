"""How the memory of a scheduler moves with the latents: earlier predictions, derivatives, a corrector's sample."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The corrector of UniPC and Helios, and that of SA-Solver.
_CORRECTORS = ("multistep_uni_c_bh_update", "stochastic_adams_moulton_update")
# The list of earlier derivatives of LMS, and that of IPNDM.
_LISTS = ("derivatives", "ets")


def moved(tensor: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Adds a change in float32 or better; returns the tensor's dtype."""
    dtype = torch.promote_types(tensor.dtype, change.dtype)
    return (tensor.to(dtype) + change).to(tensor.dtype)


def output_change(
    scheduler: Any, arguments: dict[str, Any], shift: torch.Tensor
) -> torch.Tensor | None:
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


def prediction_change(
    step: Callable[..., Any], arguments: dict[str, Any], shift: torch.Tensor
) -> torch.Tensor:
    """By how much the x₀ that CogVideoX's multistep scheduler predicts changes when the sample moves by `shift`.

    Its step is linear too and keeps nothing: the prediction from a model output of 0 at the sample `shift`. The noise that
    the step draws comes from a generator of its own.
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
def corrector_moved(
    scheduler: Any, change: torch.Tensor | None, shift: torch.Tensor
) -> Iterator[None]:
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

    scheduler.model_outputs = [
        None if output is None else moved(output, change) for output in before
    ]
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
