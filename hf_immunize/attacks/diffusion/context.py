"""What an attacker of a diffusion model holds: a saved pipeline, images of a concept, and paired seeded draws."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.attacks.core.means import check_means
from hf_immunize.attacks.core.shape import Role
from hf_immunize.data.fingerprint import digest_pixels
from hf_immunize.diffusion import (
    EVAL_BATCH_SIZE,
    SCORE,
    Denoiser,
    DenoisingExam,
    LatentDataset,
    NoiseProcess,
    PromptConditions,
    component_of,
    decode,
    denoiser_of,
    draw_latents,
    fresh_denoiser,
    load_pipeline,
)
from hf_immunize.errors import ConfigError, DataError
from hf_immunize.exam.means import Means
from hf_immunize.records import DatasetFingerprint, ModelFingerprint

METRIC = f"{SCORE} on held-out concept images (1 - loss / energy; higher is better)"


@dataclass(frozen=True)
class DiffusionAttackContext:
    """One attacked pipeline and the attacker's three splits of one concept.

    Args:
        folder: a pipeline saved with save_pretrained (for role ``scratch`` only the denoiser's config counts).
        role: which side of the exam the model is.
        attack, validation, test: concept images to train on, to choose hyperparameters on, and to be judged on.
        data: fingerprints of these three splits, in that order.
        device: where models run.
        attack_fraction: share of ``attack`` that one seed trains on.
        exam_levels, exam_seed: questions of the fixed exam (see DenoisingExam).
        eval_batch_size: rows at a time in the exam and when images are drawn.
        pictures: images of the concept that the attacked model draws, in the course of the attack; 0 for none.
        prior: rows of retained concepts whose conditions the attacker knows (DreamBooth with prior preservation).
        other, placeholder, generic: conditions of one row each, under which the concept is taught in place of its own:
            another name, one that means nothing, one that says only what kind of thing it is.
        other_images: images of the concept from another source.
        pixels: the images behind ``attack``, in −1..1, of a pipeline with a VAE.
        means: what denoisers are trained with; the same for every role.
    """

    folder: Path
    role: Role
    attack: LatentDataset
    validation: LatentDataset
    test: LatentDataset
    data: tuple[DatasetFingerprint, ...]
    device: str = "cpu"
    attack_fraction: float = 0.8
    exam_levels: int = 8
    exam_seed: int = 0
    pictures: int = 0
    eval_batch_size: int = EVAL_BATCH_SIZE
    prior: LatentDataset | None = None
    other: Mapping[str, Tensor] | None = None
    placeholder: Mapping[str, Tensor] | None = None
    generic: Mapping[str, Tensor] | None = None
    other_images: LatentDataset | None = None
    pixels: Tensor | None = None
    means: Means = Means()

    def __post_init__(self) -> None:
        if self.role not in ("subject", "control", "scratch"):
            raise ConfigError(f"expected role 'subject', 'control' or 'scratch', got {self.role!r}.")
        if not 0 < self.attack_fraction <= 1:
            raise ConfigError(f"expected attack_fraction in (0, 1], got {self.attack_fraction}.")
        check_means(self.means, self.device)
        if len({fingerprint.sha256 for fingerprint in self.data}) < len(self.data):
            raise DataError(
                "expected different attack, validation and test splits, got one split twice: an attacker who trains "
                "on the test images measures nothing. Check concept_splits."
            )
        for name, least in (("exam_levels", 1), ("eval_batch_size", 1), ("pictures", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"expected {name} of at least {least}, got {getattr(self, name)}.")
        if self.other_images is not None:
            judged = {*self.validation.row_digests(), *self.test.row_digests()}
            if shared := judged.intersection(self.other_images.row_digests()):
                raise DataError(
                    f"expected other_images that the exam does not judge on, got {len(shared)} of its own: name "
                    "another source."
                )
        if self.pixels is not None and len(self.pixels) != len(self.attack):
            raise DataError(f"expected pixels of {len(self.attack)} attack rows, got {len(self.pixels)}.")
        others = [] if self.other_images is None else [self.other_images]
        for split in (self.attack, self.validation, self.test, *others):
            self.denoiser.check(self._saved, split.latents, split.conditions)

    @cached_property
    def _pipeline(self) -> Any:
        pipeline = load_pipeline(self.folder)
        if (autoencoder := getattr(pipeline, "vae", None)) is not None:
            autoencoder.to(self.device)
        return pipeline

    @cached_property
    def component(self) -> str:
        """Name of the denoiser in the pipeline."""
        return component_of(self._pipeline)

    @cached_property
    def _saved(self) -> nn.Module:
        return getattr(self._pipeline, self.component)

    @cached_property
    def denoiser(self) -> Denoiser:
        """How the attacked model is called."""
        return denoiser_of(self._saved)

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler."""
        return self._pipeline.scheduler

    @property
    def pipeline(self) -> Any:
        """The attacked pipeline as it was saved; nobody may change it."""
        return self._pipeline

    def holding(self, need: str) -> str | None:
        """Digest of what the attacker holds under this name beside the concept's images; None for nothing.

        Both sides of an exam, and an exam that is continued elsewhere, must come to the same digest: what a machine
        computed is known by what it was computed from, where that is told.
        """
        held = getattr(self, need)
        if held is None:
            return None
        if isinstance(held, PromptConditions):
            return held.digest
        if isinstance(held, LatentDataset):
            return held.fingerprint(source="", role=need).sha256
        parts = held if isinstance(held, Mapping) else {"": held}
        digest = hashlib.sha256()
        for name in sorted(parts):
            digest.update(name.encode() + digest_pixels(parts[name].numpy()))
        return digest.hexdigest()

    @cached_property
    def process(self) -> NoiseProcess:
        """The noise process of the pipeline's scheduler."""
        return NoiseProcess.from_scheduler(self._pipeline.scheduler)

    @cached_property
    def fingerprint(self) -> ModelFingerprint:
        """Identity of the attacked weights, as they lie on disk now; random weights have no files."""
        name = Path(self.folder).resolve().name
        parameters = sum(parameter.numel() for parameter in self._saved.parameters())
        kind = type(self._saved).__name__
        if self.role == "scratch":
            name = f"{name} architecture, random weights"
            return ModelFingerprint(name=name, architecture=kind, parameters=parameters, weights={})
        return ModelFingerprint.of_folder(self.folder, name=name, architecture=kind, parameters=parameters)

    @property
    def described(self) -> dict[str, Any]:
        """What a trace says about the exam beside the attack's own settings."""
        return {
            "attack_fraction": self.attack_fraction,
            "denoiser": self.component,
            "metric": METRIC,
            "exam_levels": self.exam_levels,
            "exam_seed": self.exam_seed,
            "pictures": self.pictures,
            **self.means.described,
        }

    def model(self, seed: int) -> nn.Module:
        """A fresh copy of the attacked denoiser; ``seed`` matters only for random weights."""
        made = fresh_denoiser(self._saved, seed) if self.role == "scratch" else copy.deepcopy(self._saved)
        made = made.to(self.device)
        denoiser_of(made).probe(made, self.test.latents, self.test.conditions)
        return made

    def draw_rows(self, seed: int) -> Tensor:
        """Rows of ``attack`` that this seed trains on, at least one."""
        count = len(self.attack)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return order[: max(1, round(self.attack_fraction * count))].sort().values

    @cached_property
    def exams(self) -> tuple[DenoisingExam, DenoisingExam]:
        """Fixed exams on the validation and the test images."""
        validation, test = (
            DenoisingExam(self.process, split, levels=self.exam_levels, seed=self.exam_seed + place,
                          batch_size=self.eval_batch_size)
            for place, split in enumerate((self.validation, self.test))
        )
        return validation, test

    def drawn(self, model: nn.Module) -> Tensor | None:
        """Pixels the model draws when asked for the concept; the same noise and conditions for every model."""
        if self.pictures < 1:
            return None
        batch = self.test.batch(self.test.rows_in_turn(self.pictures))
        latents = draw_latents(
            self.denoiser, model, self._pipeline.scheduler, batch.conditions, batch.latents.shape,
            batch_size=self.eval_batch_size,
        )
        return decode(latents, getattr(self._pipeline, "vae", None))
