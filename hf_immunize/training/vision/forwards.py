"""Forwards of primary and harmful rows, and what the terms need of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_immunize.features import Captured, RowLayout, capture_inputs
from hf_immunize.training.core.measured import Side
from hf_immunize.training.core.objective import SIDES, MicroBatch
from hf_immunize.training.core.step import Measured
from hf_immunize.training.vision.config import ImmunizationConfig
from hf_immunize.training.vision.dropout import hold_dropout
from hf_immunize.training.vision.frozen import FrozenPart
from hf_immunize.training.vision.lora_attacker import LoraAttacker
from hf_immunize.training.vision.norms import frozen_statistics, unlearned_statistics
from hf_immunize.training.vision.primary import REGRESSION

_NOT_INPUTS = ("labels", "classes", "answers", "harmful")
"""What a batch holds besides the arguments of a forward without loss."""


class Forwards:
    """How this run calls its model.

    Args:
        kind: of the primary task (``primary.py``).
        head: the module whose input probes measure.
        sites: where terms are measured.
        layers: preconditioned layers, whose inputs are wanted too.
        layouts: how an input becomes one row per image.
        frozen: the part that may be skipped.
        undropped: dropout layers that never drop; where θ₀'s answers or features are imitated none does.
        attacker: whose updates harmful forwards have, if there is one.
        context: precision of a forward.
    """

    def __init__(
        self,
        args: ImmunizationConfig,
        *,
        kind: str,
        head: str,
        sites: Sequence[str],
        layers: Sequence[str],
        layouts: Mapping[str, RowLayout],
        frozen: FrozenPart,
        undropped: Sequence[str],
        attacker: LoraAttacker | None,
        context: Callable[[], AbstractContextManager[Any]],
    ):
        self.args, self.kind, self.head, self.sites, self.layers = args, kind, head, list(sites), list(layers)
        self.layouts, self.frozen, self.attacker, self.context = layouts, frozen, attacker, context
        self._undropped = None if args.distillation or args.feature_distillation else list(undropped)

    def hold(self, model: nn.Module) -> None:
        """Of a model in training mode, put into evaluation mode what does not train and does not drop."""
        self.frozen.hold(model)
        hold_dropout(model, self._undropped)

    def laid_out(self, names: Sequence[str]) -> dict[str, RowLayout | None]:
        """Names with their layouts, each once."""
        return {name: self.layouts.get(name) for name in dict.fromkeys(names)}

    @contextlib.contextmanager
    def entered(self, bare: nn.Module, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Inputs of a forward: pixels, or a placeholder where it starts at cached activations; float targets."""
        with self.frozen.entered(bare, dict(inputs)) as plain:
            if self.kind == REGRESSION and "labels" in plain:
                plain = plain | {"labels": plain["labels"].float()}
            yield plain

    def features(self, model: nn.Module, bare: nn.Module, inputs: Mapping[str, Any], *, attacked: bool = False) -> Any:
        """A forward without labels, for its features; ``attacked``: with the attacker's updates, if it makes any."""
        updates = self.attacker.attached(bare) if attacked and self.attacker else contextlib.nullcontext()
        with updates, self.frozen.entered(bare, dict(inputs)) as plain:
            return model(**{name: value for name, value in plain.items() if name not in _NOT_INPUTS})

    @contextlib.contextmanager
    def watched(self, bare: nn.Module) -> Iterator[Captured]:
        """Capture what terms, preconditioner and feature distillation need of one forward."""
        head = [self.head] if self.args.feature_distillation else []
        with capture_inputs(bare, self.laid_out([*self.sites, *self.layers, *head])) as caught:
            yield caught

    @contextlib.contextmanager
    def side(self, bare: nn.Module, side: str) -> Iterator[Captured]:
        """Around one forward: BatchNorm statistics as suits the side, and what was caught."""
        every = self.args.freeze_norm_statistics or side == "harmful"
        with frozen_statistics(bare, every=every), self.watched(bare) as caught:
            yield caught

    def measured(self, caught: Mapping[str, Captured], inputs: Mapping[str, Any]) -> Measured:
        """What the terms see of one micro-batch. The harmful classes are numbers, so that nothing waits for them."""
        features = {side: {site: caught[side][site] for site in self.sites} for side in SIDES}
        harmful = torch.tensor(inputs["harmful"]["classes"])
        nothing = harmful.new_zeros(next((len(rows) for rows in features["primary"].values()), 0))
        labels: dict[Side, Tensor] = {"primary": inputs.get("labels", nothing), "harmful": harmful}
        raw = {str(side): {name: caught[side].raw(name) for name in self.layers} for side in SIDES}
        return Measured(MicroBatch(features, labels), raw)

    def ahead(self, bare: nn.Module, inputs: Mapping[str, Any], step: int, place: int) -> Measured:
        """Both sides of a micro-batch before its turn, drawing and normalizing as it will; nothing is learned."""
        bare.train()
        self.hold(bare)
        caught = {}
        with unlearned_statistics(bare), self.same_draws(step, place), self.context():
            for name, batch in (("primary", inputs), ("harmful", inputs["harmful"])):
                with self.side(bare, name) as caught[name]:
                    self.features(bare, bare, batch, attacked=name == "harmful")
        return self.measured(caught, inputs)

    @contextlib.contextmanager
    def same_draws(self, step: int, place: int) -> Iterator[None]:
        """Every pass over a micro-batch draws the same dropout masks: a generator state derived from the step."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            micro = step * self.args.gradient_accumulation_steps + place
            torch.manual_seed((self.args.seed * 1_000_003 + micro) * 1_009 + self.args.process_index)
            yield

    def at_sites_and_head(self, bare: nn.Module, inputs: Mapping[str, Any]) -> Captured:
        """Inputs of the sites and of the head in one forward."""
        with self.context(), capture_inputs(bare, self.laid_out([*self.sites, self.head])) as caught:
            self.features(bare, bare, inputs)
        return caught

    def attacked(self, bare: nn.Module, inputs: Mapping[str, Any], names: Sequence[str]) -> list[Tensor]:
        """One row per image of the named inputs, of a simulated attacker's copy; BatchNorm as he was told.

        Rows of several micro-batches go through the copy one micro-batch at a time, whose activations are computed
        again for the backward pass: an attacker's step takes no more memory than a micro-batch of ours.
        """
        rows = len(inputs["boundary"][0] if "boundary" in inputs else inputs["pixel_values"])
        most = self.args.per_device_harmful_batch_size
        if rows <= most or self.args.attacker_second_order:  # whose second derivative wants the graph
            return self._attacked(bare, inputs, names)
        parts = [
            checkpoint(self._attacked, bare, _rows_from(inputs, at, at + most), names, use_reentrant=False)
            for at in range(0, rows, most)
        ]
        return [torch.cat(found) for found in zip(*parts, strict=True)]

    def _attacked(self, bare: nn.Module, inputs: Mapping[str, Any], names: Sequence[str]) -> list[Tensor]:
        batch = self.args.attacker_norms == "batch"
        held = unlearned_statistics(bare) if batch else frozen_statistics(bare, every=True)
        with held, self.context(), capture_inputs(bare, self.laid_out(names)) as caught:
            self.features(bare, bare, inputs)
        return [caught[name] for name in names]

    def at_head(self, bare: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """One row per image of the head's input, of any copy of the model; harmful rows teach no statistics."""
        with frozen_statistics(bare, every=True), self.context():
            with capture_inputs(bare, self.laid_out([self.head])) as caught:
                self.features(bare, bare, inputs)
        return caught[self.head]


def _rows_from(inputs: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Some rows of a batch, whose values have one entry per row, or are tuples of such."""
    return {name: tuple(part[start:stop] for part in value) if isinstance(value, tuple) else value[start:stop]
            for name, value in inputs.items()}
