"""The global batch on every rank, in an order that does not depend on how many ranks there are; sums over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hf_immunize.training.core.exchange import RowExchange, world

__all__ = [
    "RowExchange", "gather_rows", "average_over_ranks", "average_with", "mean_over_ranks", "sum_over_ranks", "world",
]

_BUCKET = 2**28
"""Bytes of tensors that are summed over ranks by one call: more would hold a second copy of a model's gradients."""


def gather_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """All ranks' rows, without gradient, and the places of this rank's rows among them.

    Rank r's row i stands before rank r+1's row i, which undoes a round-robin split: the result equals the batch that
    one process would have seen. Ranks may hold different numbers of rows. For many tensors see ``RowExchange``.
    """
    (gathered,) = RowExchange()([rows])
    return gathered


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over ranks, in place: a call for each dtype, and for each 256 MiB.

    Every rank has to pass the same shapes, dtypes and devices in the same order.
    """
    if world()[1] == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in bucket])
        with torch.no_grad():
            torch._foreach_copy_(bucket, [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)])


def average_over_ranks(gradients: Sequence[Tensor]) -> None:
    """Replace each gradient by its mean over ranks, in place; calls and conditions as for ``sum_over_ranks``."""
    _, size = world()
    if size > 1 and gradients:
        sum_over_ranks(gradients)
        with torch.no_grad():
            torch._foreach_div_(list(gradients), size)


def average_with(gradients: Sequence[Tensor], value: Tensor) -> Tensor:
    """``average_over_ranks``, and the mean of a scalar of the same dtype by the same call, without gradient."""
    value = value.detach().clone()
    average_over_ranks([*gradients, value])
    return value


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a scalar over ranks, without gradient."""
    return average_with([], value)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device, in their order, as many as fit one call."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in kinds.values():
        bucket: list[Tensor] = []
        held = 0
        for tensor in same:
            size = tensor.numel() * tensor.element_size()
            if bucket and held + size > _BUCKET:
                yield bucket
                bucket, held = [], 0
            bucket.append(tensor)
            held += size
        yield bucket
