"""What measuring 280 sites costs: collectives, read-backs and CPU seconds between features and their gradients.

    python benchmarks/step_time.py --parts wire [--before CHECKOUT]

starts this file in two processes. Widths are those of what LoRA trains in SDXL's UNet (query and value projections of
70 transformer blocks, self and cross attention); rows are random. DDP's own collectives are none of ours, and not here.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from hf_immunize.training.core.meter import Meter
from hf_immunize.training.core.objective import GlobalObjective, MicroBatch
from hf_immunize.training.core.terms import TermSettings

try:
    from hf_immunize.training.core.registry import terms_of
except ImportError:  # --before: a checkout from when the names of objectives stood beside their terms
    from hf_immunize.training.core.terms import terms_of

WIDTHS = [640] * 30 + [1280] * 180 + [2048] * 70
ROWS, CLASSES = 16, 4
COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "all_to_all", "broadcast", "reduce",
    "all_gather_object", "broadcast_object_list",
)  # fmt: skip
aten = torch.ops.aten


class ReadBacks(TorchDispatchMode):
    """Counts what a host would wait for on an accelerator: numbers that are read, and shapes that values decide."""

    WAITING = {
        aten._local_scalar_dense.default, aten.nonzero.default, aten._unique2.default,
        aten.unique_consecutive.default, aten.repeat_interleave.Tensor, aten.masked_select.default,
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in self.WAITING
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> ReadBacks:
        # tolist copies a whole tensor without passing the dispatcher.
        self._tolist = torch.Tensor.tolist

        def tolist(tensor: torch.Tensor) -> Any:
            self.count += 1
            return self._tolist(tensor)

        torch.Tensor.tolist = tolist  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.Tensor.tolist = self._tolist  # type: ignore[method-assign]
        super().__exit__(*error)


@contextlib.contextmanager
def collectives() -> Iterator[list[str]]:
    """Names of torch.distributed's collectives in the order in which Python calls them inside."""
    called: list[str] = []
    kept = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return kept[name](*args, **kwargs)

        return call

    for name in kept:
        setattr(dist, name, counted(name))
    try:
        yield called
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def objective_of(name: str) -> GlobalObjective:
    """An objective at all sites, past its first measurement of the base."""
    sites = [f"site {place}" for place in range(len(WIDTHS))]
    objective = GlobalObjective(
        terms_of(name), TermSettings(harmful_classes=CLASSES), dict.fromkeys(sites, 1.0 / len(sites)), weight="auto",
        strength=0.1, shares=None, bank_rows=0, meter=Meter(),
    )
    for weights in objective.weights.values():
        weights.reference = torch.ones((), dtype=torch.float64)
    return objective


def batch(objective: GlobalObjective, seed: int) -> MicroBatch:
    """This rank's features and labels of one micro-batch."""
    generator = torch.Generator().manual_seed(seed)
    features = {
        side: {site: torch.randn(ROWS, width, generator=generator)
               for site, width in zip(objective.sites, WIDTHS, strict=True)}
        for side in ("primary", "harmful")
    }  # fmt: skip
    labels = torch.arange(ROWS) % CLASSES
    return MicroBatch(features, {"primary": labels, "harmful": labels})  # type: ignore[arg-type]


def measured(name: str, micro_batches: int, rank: int, repeats: int = 5) -> dict[str, Any]:
    """Collectives, read-backs and CPU seconds of a step's objective, after a first step that makes memory."""
    objective = objective_of(name)
    micros = [batch(objective, 10 * rank + place) for place in range(micro_batches)]
    objective.gradients(micros, spectra=False)
    with collectives() as called, ReadBacks() as reads:
        objective.gradients(micros, spectra=False)
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        objective.gradients(micros, spectra=False)
        seconds.append(time.process_time() - start)
    return {"collectives": len(called), "read_backs": reads.count, "seconds": median(seconds)}


def main() -> None:
    """Print, on the first rank, what was measured as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {
        f"{name}, {count} micro-batch{'es' * (count > 1)}": measured(name, count, dist.get_rank())
        for name in sys.argv[1:] for count in (1, 2)
    }
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
