"""What several ranks gather and sum: ``exchange_run.py OUTPUT``, under torch.distributed.run."""

import sys

import torch
import torch.distributed as dist
from launching import leave
from safetensors.torch import save_file

from hf_immunize.training.core.distributed import RowExchange, average_over_ranks, gather_rows, sum_over_ranks
from hf_immunize.training.core.meter import Meter

ONE_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
calls = {ONE_GATHER: 0, "all_gather": 0, "all_reduce": 0}


def counted(name):
    real = getattr(dist, name)

    def call(*args, **kwargs):
        calls[name] += 1
        return real(*args, **kwargs)

    return call


for name in calls:
    setattr(dist, name, counted(name))
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
found, told = {}, {}


def taken() -> list[int]:
    now = list(calls.values())
    calls.update(dict.fromkeys(calls, 0))
    return now


def told_rows(counts: list[int]) -> list[torch.Tensor]:
    """One tensor of each dtype, whose numbers say rank, row and place, and need all the bits of their dtype."""
    numbers = [torch.arange(count).mul(7 * size).add(7 * rank).double() for count in counts]
    wide = numbers[0][:, None] + torch.arange(3).double() / 3
    half = (numbers[1][:, None, None] + torch.ones(2, 2)).bfloat16()
    return [wide, half, numbers[2].long() + 2**53 + 1, numbers[3][:, None].float() / 3, numbers[4] % 2 == 0]


exchange = RowExchange()
for step, base in enumerate((3, 3, 2, 5, 4)):
    counts = [base, base, base + rank, base - rank, 2 * rank]
    for place, (rows, mine) in enumerate(exchange(told_rows(counts))):
        found[f"{step}.{place}.rows"], found[f"{step}.{place}.mine"] = rows.contiguous(), mine.clone()
    told[f"calls.{step}"] = torch.tensor(taken())
found["alone.rows"], found["alone.mine"] = gather_rows(torch.tensor([[10.0 * rank + i] for i in range(3 - rank)]))
taken()

parts = [torch.full((2, 3), rank + 1.0), torch.full((4,), 2.0**rank, dtype=torch.float64), torch.ones(5) * rank]
sum_over_ranks(parts)
found |= {f"sum.{place}": part for place, part in enumerate(parts)}
told["calls.sum"] = torch.tensor(taken())
parts = [torch.full((2, 3), rank + 1.0), torch.full((), 4.0 * rank)]
average_over_ranks(parts)
found |= {f"mean.{place}": part for place, part in enumerate(parts)}
told["calls.mean"] = torch.tensor(taken())

meter = Meter()
for micro in range(2):
    meter.add({"loss": torch.tensor(float(rank + micro)), "distance": torch.tensor(10.0 * rank)}, local=True)
meter.end_step()
told["calls.meter"] = torch.tensor(taken())
means = meter.drain()
found["meter"] = torch.tensor([means[name] for name in ("loss", "distance")])
save_file({**found, **told}, f"{sys.argv[1]}.{rank}")
leave()
