"""Nested values with the batch left open: which tensors hold one row per image, which are the same for every image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Open:
    """A tensor that depends on the images. Sizes are (factor, fixed): factor·rows where factor is not 0."""

    sizes: tuple[tuple[int, int], ...]
    dtype: torch.dtype

    @property
    def by_row(self) -> bool:
        """Whether it holds exactly one row per image along its first dimension, and only there."""
        factors = [factor for factor, _ in self.sizes]
        return bool(factors) and factors[0] == 1 and not any(factors[1:])


@dataclass(frozen=True)
class Count:
    """A Python integer that scales with the number of images."""

    factor: int


Template = Any
"""Tuples, lists and dicts of Open, Count, and values that are the same for every batch."""


def template_of(first: Any, second: Any, rows: tuple[int, int], *, strict: bool = True) -> Template:
    """What two traces with ``rows`` images have in common.

    With ``strict`` every tensor must be constant or hold one row per image.

    Raises:
        ValueError: structures that differ, or with ``strict`` a tensor of another kind.
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return _tensor_template(first, second, rows, strict)
    if type(first) is not type(second):
        raise ValueError(f"{type(first).__name__} in one trace, {type(second).__name__} in the other")
    if isinstance(first, dict):
        if first.keys() != second.keys():
            raise ValueError("other keys in the second trace")
        return _Mapping(
            type(first), {key: template_of(first[key], second[key], rows, strict=strict) for key in first}
        )
    if isinstance(first, tuple | list):
        parts = [template_of(a, b, rows, strict=strict) for a, b in zip(first, second, strict=True)]
        return _Sequence(type(first), tuple(parts))
    if isinstance(first, int) and not isinstance(first, bool) and first != second:
        if first % rows[0] == 0 and first // rows[0] * rows[1] == second:
            return Count(first // rows[0])
        raise ValueError(f"{first} and {second} do not scale with the batch")
    return first


@dataclass(frozen=True)
class _Mapping:
    kind: type
    parts: dict[Any, Template]


@dataclass(frozen=True)
class _Sequence:
    kind: type
    parts: tuple[Template, ...]


def _tensor_template(first: Tensor, second: Tensor, rows: tuple[int, int], strict: bool) -> Template:
    if first.shape == second.shape and torch.equal(first, second):
        return first.detach().clone()
    if first.dim() != second.dim():
        raise ValueError("other dimensions in the second trace")
    sizes = []
    for one, two in zip(first.shape, second.shape, strict=True):
        if one == two:
            sizes.append((0, one))
        elif one % rows[0] == 0 and one // rows[0] * rows[1] == two:
            sizes.append((one // rows[0], 0))
        else:
            raise ValueError(f"sizes {one} and {two} do not scale with the batch")
    found = Open(tuple(sizes), first.dtype)
    if strict and not found.by_row:
        raise ValueError(f"expected one row per image, got sizes {sizes}")
    return found


def batch_tensors(template: Template, value: Any) -> list[Tensor]:
    """The tensors of ``value`` at the open places of its template, in order."""
    if isinstance(template, Open):
        return [value]
    if isinstance(template, _Mapping):
        return [found for key, part in template.parts.items() for found in batch_tensors(part, value[key])]
    if isinstance(template, _Sequence):
        return [found for part, one in zip(template.parts, value, strict=True) for found in batch_tensors(part, one)]
    return []


def fill(
    template: Template, count: int, device: torch.device, *, rows: Iterator[Tensor] | None = None, blank: float = 0.0
) -> Any:
    """The value for ``count`` images: open places take the next of ``rows``, or tensors full of ``blank``."""
    if isinstance(template, Open):
        if rows is not None:
            return next(rows)
        shape = [factor * count if factor else size for factor, size in template.sizes]
        content = blank if template.dtype.is_floating_point else 0
        return torch.full(shape, content, dtype=template.dtype, device=device)
    if isinstance(template, Count):
        return template.factor * count
    if isinstance(template, Tensor):
        return template.to(device)
    if isinstance(template, _Mapping):
        parts = {key: fill(part, count, device, rows=rows, blank=blank) for key, part in template.parts.items()}
        return template.kind(**parts) if template.kind is not dict else parts
    if isinstance(template, _Sequence):
        return template.kind(fill(part, count, device, rows=rows, blank=blank) for part in template.parts)
    return template
