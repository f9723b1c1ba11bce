"""The global batch on every rank, in an order that does not depend on how many ranks there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET = 2**28
"""Bytes that one all-reduce carries at most, unless a single tensor is larger."""
_PIECE = 2**22
"""Numbers whose squares are in float64 at a time."""


def world() -> tuple[int, int]:
    """(rank, world size) of the default process group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """All ranks' rows, without gradient, and the places of this rank's rows among them.

    Rank r's row i stands before rank r+1's row i, which undoes a round-robin split: the result equals the batch that
    one process would have seen. Ranks may hold different numbers of rows.
    """
    rank, size = world()
    rows = rows.detach()
    if size == 1:
        return rows, torch.arange(len(rows), device=rows.device)
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(size)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded.contiguous())
    order = sorted((row, owner) for owner, count in enumerate(sizes) for row in range(count))
    everything = torch.stack([parts[owner][row] for row, owner in order])
    mine = torch.tensor([place for place, (_, owner) in enumerate(order) if owner == rank], device=rows.device)
    return everything, mine


def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Mean over ranks, in place and in the tensors' own dtype: one all-reduce for each 256 MiB of one dtype."""
    _, size = world()
    if size == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat)
        flat /= size
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in kinds.values():
        bucket: list[Tensor] = []
        for tensor in same:
            if bucket and sum(held.nbytes for held in bucket) + tensor.nbytes > _BUCKET:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all tensors together, float64; no more than a few million numbers are in float64 at once."""
    squares = [
        torch.linalg.vector_norm(piece, dtype=torch.float64).square()
        for tensor in tensors
        for piece in tensor.detach().reshape(-1).split(_PIECE)
    ]
    return torch.stack(squares).sum().sqrt()


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a scalar over ranks, without gradient."""
    _, size = world()
    value = value.detach().clone()
    if size > 1:
        dist.all_reduce(value)
    return value / size
