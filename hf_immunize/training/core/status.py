"""Values that are not there: a term without a value at a moment is said to have none, and costs no run."""

from __future__ import annotations

import math

from hf_immunize.errors import SpectrumError


def defined(name: str, value: float) -> float:
    """``value``, where it is one.

    Raises:
        SpectrumError: a term that has no value there, as 1 / Q of one row, which has no spectrum.
    """
    if not math.isfinite(value):
        raise SpectrumError(
            f"expected rows on which {name} has a value, got {value}: their features have no spectrum, because there "
            "is one row, or all of them have collapsed to one point. Bring more different images."
        )
    return value
