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

    Attributes:
        model: the copy.
    """

    def __init__(self, student: nn.Module, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext):
        still = {id(parameter): parameter for parameter in student.parameters() if not parameter.requires_grad}
        self.model = copy.deepcopy(student, still).requires_grad_(False).eval()
        self._autocast = autocast

    @contextmanager
    def answering(self, device: torch.device | None = None) -> Iterator[nn.Module]:
        """Inside, the copy may be called: it is on ``device``, and what it computes has no graph."""
        if device is not None:
            self.model.to(device)
        with torch.no_grad(), self._autocast():
            yield self.model
