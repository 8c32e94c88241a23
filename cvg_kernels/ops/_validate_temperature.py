"""What path flow and the min-max product share."""

from __future__ import annotations

from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops._validate_given import normalize_number


def check_temperature(temperature: float | None) -> None:
    """Checks the temperature of a soft form.

    Raises:
        ArgumentError: unless it is `None` or positive.
    """
    wanted = "None or positive"
    if temperature is not None and not normalize_number("temperature", temperature, wanted) > 0:
        raise ArgumentError(f"temperature must be {wanted}, got {temperature!r}")
