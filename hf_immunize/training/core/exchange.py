"""Rows of many tensors exchanged between ranks by one collective.

What a rank sends is one buffer of bytes, so that nothing is rounded whatever the dtypes: how many rows each tensor has,
the rows of tensors on the CPU, the rows of all others. The first two parts are read back together, by one copy: counts
have to be known to the host, and labels kept on the CPU arrive there again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

_ALIGNED = 16
"""Bytes that every tensor's part is a multiple of, as a view in a wider dtype wants."""


def world() -> tuple[int, int]:
    """(rank, world size) of the default process group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class RowExchange:
    """All ranks' rows of several tensors, without gradient, and the places of this rank's rows among them.

    Rank r's row i stands before rank r+1's row i, which undoes a round-robin split: the result equals the batch that
    one process would have seen. Ranks may hold different numbers of rows, but the same tensors: dtype, trailing
    dimensions, device type, order.

    The room that rows need is remembered: an exchange is one collective unless it needs more room than any before it on
    any rank, as the first does; then counts go ahead by a collective of their own. Every rank knows of every count, so
    all agree. An instance must see the same calls on every rank.
    """

    def __init__(self) -> None:
        self._room = (0, 0)
        """Bytes for tensors on the CPU and for the others, the same on every rank."""

    def __call__(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Per tensor N×…, its rows of all ranks on its own device, and where this rank's are."""
        tensors = [tensor.detach() for tensor in tensors]
        rank, size = world()
        if size == 1:
            return [(tensor, torch.arange(len(tensor), device=tensor.device)) for tensor in tensors]
        plan = _Plan(tensors)
        while True:
            everything, read = self._gather(plan, size)
            counts = read[:, : plan.header].contiguous().view(torch.int64)[:, : len(tensors)].tolist()
            needs = [plan.needs(count) for count in counts]
            wanted = max(host for host, _ in needs), max(other for _, other in needs)
            if all(want <= room for want, room in zip(wanted, self._room, strict=True)):
                return _unpack(plan, everything, read, counts, self._room[0], rank)
            self._room = max(wanted[0], self._room[0]), max(wanted[1], self._room[1])

    def _gather(self, plan: _Plan, size: int) -> tuple[Tensor, Tensor]:
        """Every rank's buffer, ranks × bytes, and the part of it that the host reads."""
        front = plan.header + self._room[0]
        buffer = torch.zeros(front + self._room[1], dtype=torch.uint8, device=plan.device)
        head = torch.zeros(front, dtype=torch.uint8) if plan.device.type != "cpu" else buffer[:front]
        counts = torch.tensor([len(tensor) for tensor in plan.tensors], dtype=torch.int64)
        head[: 8 * len(counts)] = counts.view(torch.uint8)
        host, other = plan.needs(counts.tolist())
        if host <= self._room[0] and other <= self._room[1]:
            _pack(head[plan.header :], [plan.tensors[place] for place in plan.host])
            _pack(buffer[front:], [plan.tensors[place] for place in plan.other])
        if head.device != buffer.device:
            buffer[:front].copy_(head, non_blocking=True)
        everything = torch.empty(size * len(buffer), dtype=torch.uint8, device=plan.device)
        # torch 2.13 renamed it and warns of the old name.
        gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
        gather(everything, buffer)
        everything = everything.view(size, len(buffer))
        return everything, everything[:, :front].cpu()


class _Plan:
    """Where the rows of each tensor lie in a rank's buffer."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = tensors
        self.host = [place for place, tensor in enumerate(tensors) if tensor.device.type == "cpu"]
        self.other = [place for place, tensor in enumerate(tensors) if tensor.device.type != "cpu"]
        self.device = tensors[self.other[0]].device if self.other else torch.device("cpu")
        self.header = _aligned(8 * len(tensors))
        self.row_bytes = [tensor[:0].new_empty(1, *tensor.shape[1:]).nbytes for tensor in tensors]

    def starts(self, counts: Sequence[int], places: Sequence[int]) -> list[int]:
        """Offset of each of these tensors in its part for a rank with these row counts, and the end of all."""
        return list(accumulate((_aligned(counts[place] * self.row_bytes[place]) for place in places), initial=0))

    def needs(self, counts: Sequence[int]) -> tuple[int, int]:
        """Bytes of tensors on the CPU and of the others."""
        return self.starts(counts, self.host)[-1], self.starts(counts, self.other)[-1]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _pack(room: Tensor, tensors: Sequence[Tensor]) -> None:
    """Bytes of the tensors one after the other, each from a multiple of 16."""
    gap = room.new_zeros(_ALIGNED)
    parts = []
    for tensor in tensors:
        flat = tensor.to(room.device).contiguous().view(-1).view(torch.uint8)
        parts += [flat, gap[: _aligned(len(flat)) - len(flat)]]
    if parts:
        torch.cat(parts, out=room[: sum(map(len, parts))])


def _unpack(
    plan: _Plan, everything: Tensor, read: Tensor, counts: list[list[int]], host_room: int, rank: int
) -> list[tuple[Tensor, Tensor]]:
    found: list[tuple[Tensor, Tensor] | None] = [None] * len(plan.tensors)
    orders: dict[tuple[tuple[int, ...], torch.device], tuple[Tensor, Tensor]] = {}
    for places, source, front in (
        (plan.host, read, plan.header), (plan.other, everything, plan.header + host_room)
    ):
        starts = [plan.starts(count, places) for count in counts]
        for number, place in enumerate(places):
            tensor, rows = plan.tensors[place], tuple(count[place] for count in counts)
            parts = []
            for owner, start in enumerate(starts):
                first = front + start[number]
                part = source[owner, first : first + rows[owner] * plan.row_bytes[place]]
                parts.append(part.view(tensor.dtype).view(rows[owner], *tensor.shape[1:]))
            key = rows, tensor.device
            if key not in orders:
                order, mine = _turns(rows, rank)
                orders[key] = (
                    order.to(tensor.device, non_blocking=True), mine.to(tensor.device, non_blocking=True)
                )
            order, mine = orders[key]
            found[place] = torch.cat(parts).to(tensor.device).index_select(0, order), mine
    return found  # type: ignore[return-value]


def _turns(counts: Sequence[int], rank: int) -> tuple[Tensor, Tensor]:
    """Ranks take turns: rows of a concatenation of all ranks' in that order, and places of this rank's in it."""
    held = torch.tensor(counts)
    row = torch.arange(max(counts))[:, None]
    there = row < held
    order = (held.cumsum(0) - held + row)[there]
    owner = torch.arange(len(counts)).expand_as(there)[there]
    return order, (owner == rank).nonzero().squeeze(1)
