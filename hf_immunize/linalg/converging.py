"""Decompositions that fail say so as an error of this package, without a look at the device beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hf_immunize.errors import DecompositionError


@contextmanager
def converging() -> Iterator[None]:
    """Inside, and around a function that it decorates, LAPACK's refusal is a DecompositionError.

    Nothing is read to find out: torch itself checks what a decomposition reports.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise DecompositionError(
            f"expected a matrix that can be decomposed, got {said}: its values are NaN, infinite or too large. Check "
            "the images, the learning rate and the mixed-precision setting."
        ) from error
