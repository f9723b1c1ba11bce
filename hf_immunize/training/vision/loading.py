"""How both streams of a run are read: data workers, what they load ahead, pinned memory, and their time limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LoaderOptions:
    """Options of ``TrainingArguments`` that a DataLoader takes."""

    workers: int = 0
    prefetch: int | None = None
    pin: bool = False
    persistent: bool = False
    context: Any = None
    in_order: bool = True
    timeout: float = 0.0

    @classmethod
    def of(cls, args: Any) -> LoaderOptions:
        """The ``dataloader_…`` options of a run; memory is pinned where there is an accelerator to copy it to."""
        return cls(
            workers=args.dataloader_num_workers,
            prefetch=args.dataloader_prefetch_factor,
            pin=bool(args.dataloader_pin_memory) and torch.accelerator.is_available() and args.device.type != "cpu",
            persistent=bool(args.dataloader_persistent_workers),
            context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
            timeout=args.dataloader_timeout,
        )

    @property
    def words(self) -> dict[str, Any]:
        """As a DataLoader is told them; those of workers only where there are any."""
        told: dict[str, Any] = {"num_workers": self.workers, "pin_memory": self.pin}
        if self.workers:
            told |= {
                "prefetch_factor": self.prefetch, "persistent_workers": self.persistent, "timeout": self.timeout,
                "multiprocessing_context": self.context, "in_order": self.in_order,
            }
        return told
