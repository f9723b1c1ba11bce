"""What both pipelines of an exam draw: retained concepts for a judge, and pictures for the reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from hf_immunize.attacks.core.suite import picture_name
from hf_immunize.certification.generation import measure_frechet
from hf_immunize.certification.judgement import Sides
from hf_immunize.certification.primary_rows import JUDGED
from hf_immunize.certification.similarity import ImageFeatures
from hf_immunize.data import PixelMaker, convert_image, model_channels
from hf_immunize.diffusion import (
    EVAL_BATCH_SIZE,
    LatentDataset,
    component_of,
    decode,
    denoiser_of,
    draw_latents,
    grid_png,
    load_pipeline,
    to_images,
)
from hf_immunize.errors import ModelError
from hf_immunize.models import load_classifier, load_processor
from hf_immunize.records import (
    Answers,
    AttackTrace,
    FrechetGap,
    ModelFingerprint,
    UtilityRows,
    atomic_write,
    sha256_file,
)

_SHOWN = 8


@dataclass(frozen=True)
class Drawer:
    """One pipeline of the exam, ready to be asked."""

    pipeline: Any
    model: nn.Module
    steps: int
    batch_size: int = EVAL_BATCH_SIZE

    @classmethod
    def of(cls, folder: Path, device: str, steps: int, batch_size: int = EVAL_BATCH_SIZE) -> Drawer:
        """The pipeline of a folder."""
        pipeline = load_pipeline(folder)
        if (autoencoder := getattr(pipeline, "vae", None)) is not None:
            autoencoder.to(device)
        return cls(pipeline, getattr(pipeline, component_of(pipeline)).to(device).eval(), steps, batch_size)

    def fingerprint(self, folder: Path) -> ModelFingerprint:
        """Identity of the pipeline's weights on disk."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return ModelFingerprint.of_folder(
            folder, name=folder.resolve().name, architecture=type(self.model).__name__, parameters=parameters
        )

    def draw(self, dataset: LatentDataset, rows: Tensor) -> Tensor:
        """Pixels drawn for the conditions of some rows, from the noise of seed 0."""
        batch = dataset.batch(rows)
        latents = draw_latents(
            denoiser_of(self.model), self.model, self.pipeline.scheduler, batch.conditions, batch.latents.shape,
            steps=self.steps, batch_size=self.batch_size,
        )
        return decode(latents, getattr(self.pipeline, "vae", None))

    def images(self, dataset: LatentDataset) -> list[Image.Image]:
        """The real images behind a dataset's rows."""
        return to_images(decode(dataset.latents, getattr(self.pipeline, "vae", None)))


@dataclass(frozen=True)
class RetainedDrawings:
    """Retained classes in turn, drawn by both models from the same noise, when they are first asked for."""

    base: Drawer
    subject: Drawer
    retain: LatentDataset
    rows: Tensor

    @classmethod
    def of(cls, base: Drawer, subject: Drawer, retain: LatentDataset, count: int) -> RetainedDrawings:
        """``count`` images of each model."""
        return cls(base, subject, retain, retain.rows_in_turn(count))

    @cached_property
    def images(self) -> tuple[list[Image.Image], list[Image.Image]]:
        """Those of the base, those of the subject."""
        before, after = (to_images(side.draw(self.retain, self.rows)) for side in (self.base, self.subject))
        return before, after

    def recognised_by(self, judge: Path, names: Mapping[str, str] | None = None) -> UtilityRows:
        """Which drawn images the judge recognises (1) and which not (0), of both models.

        ``names`` holds what the judge calls a class, where it has another name for it.
        """
        own = [self.retain.label_names[label] for label in self.retain.labels[self.rows].tolist()]
        wanted = [(names or {}).get(name, name) for name in own]
        before, after = (recognised(judge, images, wanted) for images in self.images)
        return UtilityRows(
            metric=JUDGED, data="", subject={}, control={},
            answers=Answers(wanted=[1] * len(before), base=list(map(int, before)), immunized=list(map(int, after))),
        )

    def distance_by(self, features: ImageFeatures, level: float = 0.95) -> FrechetGap:
        """Fréchet distances of both models' drawings from all held-out real images."""
        before, after = self.images
        return measure_frechet(features, before, after, self.base.images(self.retain), level)


@torch.no_grad()
def recognised(judge: Path, images: Sequence[Image.Image], wanted: Sequence[str]) -> list[bool]:
    """Whether the judge's first answer for each image is the class that was asked for.

    Raises:
        ModelError: a class whose name the judge does not have.
    """
    model = load_classifier(judge).eval()
    make = PixelMaker(load_processor(judge), model_channels(model), "drawn images")
    config: Any = model.config
    ids = {str(name): int(number) for name, number in config.label2id.items()}
    if unknown := sorted(set(wanted) - set(ids)):
        raise ModelError(f"expected a judge with the classes {sorted(set(wanted))}, got none for {unknown}.")
    hits: list[bool] = []
    for start in range(0, len(images), 100):
        given = make([convert_image(image, make.mode) for image in images[start : start + 100]])
        answers = model(pixel_values=given).logits.argmax(dim=-1).tolist()
        names = wanted[start : start + 100]
        hits += [answer == ids[name] for answer, name in zip(answers, names, strict=True)]
    return hits


def keep_pictures(
    sides: Sides, drawers: Mapping[str, Drawer], retain: LatentDataset, harmful: LatentDataset,
    traces: Sequence[AttackTrace],
) -> dict[str, str]:
    """Draw retained classes and the concept with both models, copy the base's pictures, hash all of them."""
    classes = len(retain.labels.unique())
    for role, drawer in drawers.items():
        retained = drawer.draw(retain, retain.rows_in_turn(4 * classes))
        concept = drawer.draw(harmful, harmful.rows_in_turn(_SHOWN))
        atomic_write(sides.folder / "samples" / role / "retained.png", grid_png(retained, classes))
        atomic_write(sides.folder / "samples" / role / "before.png", grid_png(concept, _SHOWN))
    names = [f"samples/{role}/{name}.png" for role in drawers for name in ("retained", "before")]
    for trace in traces:
        name = picture_name(trace)
        source = (sides.folder if trace.role == "subject" else sides.base_folder) / name
        if source.is_file():
            if trace.role != "subject":
                atomic_write(sides.folder / name, source.read_bytes())
            names.append(name)
    return {name: sha256_file(sides.folder / name) for name in sorted(names)}
