"""What holds the model near θ₀ on primary rows: the divergence of its outputs, and the distance of its features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_immunize.features import Captured, capture_inputs
from hf_immunize.training.core.meter import Meter
from hf_immunize.training.core.teacher import Teacher
from hf_immunize.training.vision.distillation import Temperature, feature_distance
from hf_immunize.training.vision.forwards import Forwards
from hf_immunize.training.vision.primary import divergence


class Keeping:
    """``distillation`` and ``feature_distillation`` of ImmunizationConfig.

    Args:
        temperature: of the logits.
        teacher: θ₀; None where its logits come with cached rows, or nothing is compared.
        meter: is told of both distances.
    """

    def __init__(self, forwards: Forwards, temperature: Temperature, teacher: Teacher | None, meter: Meter):
        self._forwards, self._temperature, self._teacher, self._meter = forwards, temperature, teacher, meter

    def loss(
        self, primary: Mapping[str, Any], outputs: Any, caught: Captured, device: torch.device | None
    ) -> Tensor | float:
        """Both distances on one micro-batch, weighted; ``device`` is where θ₀ is moved to, None where it is split."""
        args, target, features = self._forwards.args, primary.get("teacher_logits"), None
        if self._teacher is not None:
            theirs, features = self._answers(self._teacher, primary, device)
            target = theirs.get("logits")
        total: Tensor | float = 0.0
        if args.distillation:
            ours, temperature = outputs["logits"], self._temperature.value
            assert target is not None and temperature is not None, "measured before the first step"
            distance = divergence(ours, target.to(ours.dtype), self._forwards.kind, temperature)
            self._meter.add({"distillation": distance}, local=True)
            total = total + args.distillation * distance
        if features is not None and args.feature_distillation:
            distance = feature_distance(caught[self._forwards.head], features)
            self._meter.add({"feature_distillation": distance}, local=True)
            total = total + args.feature_distillation * distance
        return total

    def _answers(
        self, teacher: Teacher, primary: Mapping[str, Any], device: torch.device | None
    ) -> tuple[Any, Tensor]:
        """θ₀'s outputs, and its features at the head."""
        head = self._forwards.head
        at_head = self._forwards.laid_out([head])
        with teacher.answering(device) as model, capture_inputs(model, at_head) as caught:
            with self._forwards.frozen.entered(model, dict(primary)) as plain:
                theirs = model(**{name: part for name, part in plain.items() if name != "labels"})
        return theirs, caught[head]
