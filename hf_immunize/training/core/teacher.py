"""The model before immunization, kept to be imitated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


class Teacher:
    """θ₀ as it answers before training: in evaluation mode, without gradients, under the student's autocast.

    Parameters that the student does not train are held once, by both: the copy costs as much as what is trained.
    Buffers are copied, since BatchNorm statistics may learn while weights stay.

    Args:
        student: the bare model, not yet trained; its ``requires_grad`` flags say what will be.
        autocast: makes the context in which the student runs, ``accelerator.autocast``.
        share: whether frozen parameters may be held once: not if each copy is to be split over ranks.
        twin: makes the copy of a student that is split already.

    Attributes:
        model: the copy.
    """

    def __init__(
        self, student: nn.Module, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext, *,
        share: bool = True, twin: Callable[[], nn.Module] | None = None,
    ):  # fmt: skip
        still = {id(one): one for one in student.parameters() if share and not one.requires_grad}
        made = copy.deepcopy(student, still) if twin is None else twin()
        self.model = made.requires_grad_(False).eval()
        self._autocast = autocast

    @contextmanager
    def answering(self, device: torch.device | None = None) -> Iterator[nn.Module]:
        """Inside, the copy may be called: it is on ``device``, and what it computes has no graph."""
        if device is not None:
            self.model.to(device)
        with torch.no_grad(), self._autocast():
            yield self.model
