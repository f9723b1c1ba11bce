"""The global batch on every rank, in an order that does not depend on how many ranks there are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


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


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a scalar over ranks, without gradient."""
    _, size = world()
    value = value.detach().clone()
    if size > 1:
        dist.all_reduce(value)
    return value / size


def mean_of_gradients(gradients: Sequence[Tensor]) -> None:
    """Mean over ranks of each tensor, in place, in one exchange per dtype and device."""
    _, size = world()
    if size == 1:
        return
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault((gradient.dtype, gradient.device), []).append(gradient)
    for group in groups.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in group])
        dist.all_reduce(flat)
        parts = (flat / size).split([gradient.numel() for gradient in group])
        for gradient, part in zip(group, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
