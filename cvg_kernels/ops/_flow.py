"""What path flow and the min-max product share."""

from __future__ import annotations

from cvg_kernels.errors import ArgumentError


def check_temperature(temperature: float | None) -> None:
    """Checks the temperature of a soft form.

    Raises:
        ArgumentError: unless it is `None` or positive.
    """
    if temperature is not None and not temperature > 0:
        raise ArgumentError(f"temperature must be None or positive, got {temperature!r}")
