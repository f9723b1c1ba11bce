"""One optimizer step: its micro-batches, the gradients of the terms at their features, and how these enter the loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.data import augment, parse_augmentation
from hf_immunize.errors import ConfigError
from hf_immunize.features import Captured, RowLayout, capture_inputs
from hf_immunize.linalg.precondition import InverseMoment
from hf_immunize.training.core.distributed import gather_rows, world
from hf_immunize.training.core.meter import Meter
from hf_immunize.training.core.objective import SIDES, GlobalObjective, MicroBatch, SiteGradients
from hf_immunize.training.core.terms import IMMA, Rows, imma_training_loss
from hf_immunize.training.core.watch import Watch
from hf_immunize.training.vision.frozen import FrozenPart
from hf_immunize.training.vision.harmful_stream import HarmfulStream
from hf_immunize.training.vision.lora_attacker import LoraAttacker
from hf_immunize.training.vision.norms import frozen_statistics, unlearned_statistics
from hf_immunize.training.vision.preconditioning import Preconditioner
from hf_immunize.training.vision.primary import UNLABELLED, wrong_labels

_NOT_INPUTS = ("labels", "classes", "harmful")
"""What a batch holds besides the arguments of a forward without loss."""


@dataclass(frozen=True)
class Plan:
    """What one micro-batch injects: gradients at its features, and K̃⁻¹ of the preconditioned layers by side."""

    gradients: SiteGradients
    inverses: dict[str, dict[str, tuple[InverseMoment, float]]]


@dataclass(frozen=True)
class _Micro:
    """A micro-batch as measured, with the inputs of the preconditioned layers by side."""

    batch: MicroBatch
    inputs: dict[str, dict[str, Tensor]]


class StepMixin:
    """Micro-batches and injection; expects the attributes below."""

    args: Any
    state: Any
    model: Any
    accelerator: Any
    kind: str
    site: str
    layouts: dict[str, RowLayout]
    frozen: FrozenPart
    objective: GlobalObjective
    preconditioner: Preconditioner | None
    attacker: LoraAttacker | None
    meter: Meter
    watch: Watch
    current_gradient_accumulation_steps: int
    _harmful: HarmfulStream
    _planned: list[Plan] | None
    _place: int

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Primary micro-batches of one optimizer step, each with its harmful batch attached."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        self.watch.step = self.state.global_step + 1
        first = self.state.global_step * self.args.gradient_accumulation_steps
        samples = [{**sample, "harmful": self._harmful_batch(first + i)} for i, sample in enumerate(samples)]
        if self.args.augmentation:
            samples = [self._augmented(sample, place, first) for place, sample in enumerate(samples)]
        if self.attacker:
            self._attack(samples)
        self._planned = self._plan(samples) if len(samples) > 1 else None
        self._place = 0
        return samples, items

    def _harmful_batch(self, step: int) -> dict[str, Any]:
        """The harmful batch of a micro-step; its classes also as numbers, which are not moved to the device."""
        batch = self._harmful.batch(step)
        return {**batch, "classes": batch["labels"].tolist()}

    def _augmented(self, sample: dict[str, Any], place: int, first: int) -> dict[str, Any]:
        """Both tasks' images changed by draws of their place in the global step, whoever holds them.

        Primary rows reach ranks in consecutive blocks, harmful ones in turn (StepBatchSampler).
        """
        names = parse_augmentation(self.args.augmentation)
        rank, size = self.args.process_index, self.args.world_size
        base = self.args.data_seed if self.args.data_seed is not None else self.args.seed

        def changed(batch: dict[str, Any], side: int, places: list[int], step: int) -> dict[str, Any]:
            seeds = [(((base * 2 + side) * 1_000_003 + step) * 1_000_003 + row) for row in places]
            pixels = batch["pixel_values"]
            return {**batch, "pixel_values": augment(pixels.cpu(), names, seeds).to(pixels.device)}

        count, harmful = len(sample["pixel_values"]), sample["harmful"]
        blocks = [(place * size + rank) * self.args.per_device_train_batch_size + row for row in range(count)]
        turns = [row * size + rank for row in range(len(harmful["pixel_values"]))]
        whole = {name: value for name, value in sample.items() if name != "harmful"}
        return changed(whole, 0, blocks, self.state.global_step) | {
            "harmful": changed(harmful, 1, turns, first + place)
        }

    def _plan(self, samples: list[dict[str, Any]]) -> list[Plan]:
        """Plans of every micro-batch, from one evaluation on all of them together."""
        model = self.accelerator.unwrap_model(self.model)
        model.train()
        self.frozen.hold(model)
        micros = []
        with torch.no_grad(), unlearned_statistics(model):
            for place, sample in enumerate(samples):
                sample = self._prepare_inputs(sample)  # type: ignore[attr-defined]
                caught = {}
                with self._same_draws(place), self.compute_loss_context_manager():  # type: ignore[attr-defined]
                    for side, inputs in (("primary", sample), ("harmful", sample["harmful"])):
                        # Statistics as in the pass with gradient, or the terms would be of other features.
                        every = self.args.freeze_norm_statistics or side == "harmful"
                        with frozen_statistics(model, every=every), self._watched(model) as caught[side]:
                            self._forward(model, inputs, attacked=side == "harmful")
                micros.append(self._micro(caught, sample))
        return self._plan_of(micros)

    @contextlib.contextmanager
    def _same_draws(self, place: int) -> Iterator[None]:
        """Both passes over a micro-batch draw the same dropout masks: a generator state derived from the step."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            step = self.state.global_step * self.args.gradient_accumulation_steps + place
            torch.manual_seed((self.args.seed * 1_000_003 + step) * 1_009 + self.args.process_index)
            yield

    @contextlib.contextmanager
    def _watched(self, bare: nn.Module) -> Iterator[Captured]:
        """Capture what the objective, the preconditioner and feature distillation need of one forward."""
        layers = list(self.preconditioner.layers) if self.preconditioner else []
        head = [self.site] if self.args.feature_distillation else []
        names = [*self.objective.sites, *layers, *head]
        with capture_inputs(bare, {name: self.layouts.get(name) for name in names}) as caught:
            yield caught

    def _attack(self, samples: list[dict[str, Any]]) -> None:
        """One step of the attacker's LoRA updates on the harmful rows of the coming optimizer step."""
        assert self.attacker is not None
        attacker, model, (site,) = self.attacker, self.accelerator.unwrap_model(self.model), self.objective.sites
        at_site = {site: self.layouts[site]}
        model.train()
        self.frozen.hold(model)

        def forward(place: int, harmful: dict[str, Any]) -> tuple[Tensor, Tensor]:
            inputs = self._prepare_inputs(harmful)  # type: ignore[attr-defined]
            with self._same_draws(place), self.compute_loss_context_manager():  # type: ignore[attr-defined]
                with attacker.attached(model, learning=True), capture_inputs(model, at_site) as caught:
                    self._forward(model, inputs)
            return caught[site], torch.tensor(harmful["classes"])  # on the CPU, where reading them waits for nothing

        def loss_of(rows: Rows) -> Tensor:
            rows.memory = self.objective.memory[site].get(IMMA.name, {})
            return imma_training_loss(rows, self.objective.settings)

        with frozen_statistics(model, every=True):
            forwards = [partial(forward, place, sample["harmful"]) for place, sample in enumerate(samples)]
            self.meter.add({"attacker_lora_loss": attacker.learn(forwards, loss_of)})

    def _forward(self, model: nn.Module, inputs: dict[str, Any], *, attacked: bool = False) -> Any:
        """A forward without labels, for its features; ``attacked``: with the attacker's updates, if it makes any."""
        bare = self.accelerator.unwrap_model(model)
        updates = self.attacker.attached(bare) if attacked and self.attacker else contextlib.nullcontext()
        with updates, self.frozen.entered(bare, inputs) as plain:
            return model(**{name: value for name, value in plain.items() if name not in _NOT_INPUTS})

    def _micro(self, caught: dict[str, Captured], inputs: dict[str, Any]) -> _Micro:
        first = self.objective.sites[0]
        features = {side: {site: caught[side][site] for site in self.objective.sites} for side in SIDES}
        harmful = torch.tensor(inputs["harmful"]["classes"])
        nothing = harmful.new_zeros(len(features["primary"][first]))
        labels = {"primary": inputs.get("labels", nothing), "harmful": harmful}
        layers = list(self.preconditioner.layers) if self.preconditioner else []
        return _Micro(
            MicroBatch(features, labels), {side: {name: caught[side].raw(name) for name in layers} for side in SIDES}
        )

    def _plan_of(self, micros: Sequence[_Micro]) -> list[Plan]:
        every = self.args.logging_steps
        spectra = bool(every) and (self.state.global_step + 1) % max(int(every), 1) == 0
        gradients = self.objective.gradients([micro.batch for micro in micros], spectra=spectra)
        inverses: dict[str, dict[str, tuple[InverseMoment, float]]] = {}
        if self.preconditioner:
            for side in SIDES:
                layers = {name: [micro.inputs[side][name] for micro in micros] for name in self.preconditioner.layers}
                inverses[side] = self.preconditioner.inverses(layers)
        return [Plan(found, inverses) for found in gradients]

    def _micro_batch(self) -> int:
        """Which micro-batch of the current optimizer step this is, counting from 0."""
        if self._planned is None:
            return 0
        place = self._place
        self._place = (place + 1) % len(self._planned)
        return place

    def _inject(self, caught: dict[str, Captured], plan: Plan) -> Tensor | float:
        """A scalar of value zero whose gradient at the features is the objective's.

        The Trainer divides by the number of micro-batches and DDP by the number of ranks, as suits a mean over rows.
        The objective is one number of the whole global batch, so both are multiplied back.
        """
        scale = world()[1] * self.current_gradient_accumulation_steps
        total: Tensor | float = 0.0
        for side in SIDES:
            inner: Tensor | float = 0.0
            for site in self.objective.sites:
                features = caught[side][site]
                if not features.requires_grad:
                    raise ConfigError(
                        f"expected sites whose inputs depend on what is trained, got '{site}': train modules before it "
                        "(trainable_modules), or choose another site."
                    )
                product = (features * (scale * plan.gradients[side][site]).to(features)).sum()
                inner = inner + product - product.detach()
            if self.preconditioner:
                inner = inner + self.preconditioner.correction(inner, plan.inverses[side])
            total = total + inner
        return total

    def _measure_references(self) -> None:
        """G of every site that is balanced and has none yet."""
        waiting = [site for site, weights in self.objective.weights.items() if weights.needs_reference]
        if waiting:
            for site, norm in self._reference_gradients(waiting).items():
                self.objective.weights[site].reference = norm

    def _reference_gradients(self, sites: list[str], batches: int = 8) -> dict[str, Tensor]:
        """G: norm of the primary loss's gradient at the features with every label wrong; mean over a few steps.

        A step's batch is that of all its micro-batches and ranks, so that it does not depend on how it is cut.
        At a site with several tokens, positions or windows per image the gradient is that of a shift of all of them:
        their sum. A task without labels cannot be wrong; there the gradient of its loss as it is has to do.
        """
        bare = self.accelerator.unwrap_model(self.model)
        bare.eval()
        squares: dict[str, list[Tensor]] = {site: [] for site in sites}
        cut = self.args.gradient_accumulation_steps
        layouts = {site: self.layouts[site] for site in sites}
        for place, inputs in enumerate(self.get_train_dataloader()):  # type: ignore[attr-defined]
            if place == batches * cut:
                break
            inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
            if self.kind != UNLABELLED:
                wrong = wrong_labels(inputs["labels"], self.kind, bare.config.num_labels)
                inputs = {**inputs, "labels": wrong}
            with capture_inputs(bare, layouts) as caught, self._entered(bare, inputs) as plain:  # type: ignore[attr-defined]
                with torch.enable_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
                    loss = bare(**plain).loss
            raw = [caught.raw(site) for site in sites]
            for site, value in zip(sites, raw, strict=True):
                if not value.requires_grad:
                    raise ConfigError(
                        f"expected sites whose inputs depend on what is trained, got '{site}': train modules before it "
                        "(trainable_modules), or choose another site."
                    )
            found = torch.autograd.grad(loss, raw, allow_unused=True)
            for site, value, gradient in zip(sites, raw, found, strict=True):
                gradient = torch.zeros_like(value) if gradient is None else gradient.detach()
                squares[site].append(_global_norm(caught.shift(site, gradient)).square())
        # The mean over a step's micro-batches has the parts of each, divided by their number.
        steps = {site: [torch.stack(found[i : i + cut]) for i in range(0, len(found), cut)]
                 for site, found in squares.items()}
        return {site: torch.stack([part.sum().sqrt() / len(part) for part in parts]).mean()
                for site, parts in steps.items()}


def _global_norm(gradient: Tensor) -> Tensor:
    """Norm over the global batch of a gradient with one row per image."""
    everywhere, _ = gather_rows(gradient)
    # Each rank's loss is a mean over its own rows; the global mean divides by the number of ranks as well.
    return torch.linalg.vector_norm(everywhere.double()) / world()[1]
