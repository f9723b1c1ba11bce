"""Denoising loss on held-out examples with noise and noise levels that never change: comparable across models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_immunize.diffusion.examples import LatentDataset
from hf_immunize.diffusion.family import Denoiser, dtype_of_rows
from hf_immunize.diffusion.noise import NoiseProcess, denoising_losses

SCORE = "R2 of the denoising target"
"""What the exam's score is called in records, cards and reports."""
EVAL_BATCH_SIZE = 256
"""Rows that a model is asked about at a time."""


@dataclass(frozen=True)
class ExamResult:
    """Loss of every example, and the energy of what was to be answered."""

    losses_N: Tensor
    energies_N: Tensor
    """Mean square of the target: the loss of a model that answers zero."""

    @property
    def loss(self) -> float:
        """Mean loss over examples and levels."""
        return float(self.losses_N.mean())

    @property
    def explained(self) -> float:
        """R² = 1 − loss / energy: the share of the target that the model explains; 1 is perfect, 0 is answering zero.

        Higher is better, like an accuracy, and its denominator does not depend on the model.
        """
        return 1.0 - float(self.losses_N.double().mean() / self.energies_N.double().mean())


class DenoisingExam:
    """Each example at ``levels`` noise levels, stratified over the whole range, with noise drawn from ``seed``.

    Example i gets one level from each of ``levels`` equal parts of the range, so that the mean over examples covers
    all of it. The same examples and seed give the same questions to every model, dtype and device.
    """

    def __init__(
        self, process: NoiseProcess, dataset: LatentDataset, *, levels: int = 4, seed: int = 0,
        batch_size: int = EVAL_BATCH_SIZE,
    ):
        generator = torch.Generator().manual_seed(seed)
        count = len(dataset)
        part = torch.arange(levels).repeat_interleave(count)
        place = (part + torch.rand(levels * count, generator=generator, dtype=torch.float64)) / levels
        self._levels = (place * process.levels).long().clamp(max=process.levels - 1)
        self._noise = _Noise((levels * count, *dataset.latents.shape[1:]), generator)
        self._process, self._dataset, self._rows = process, dataset, batch_size

    @torch.no_grad()
    def ask(self, denoiser: Denoiser, model: nn.Module) -> ExamResult:
        """Answers of a bare model, in evaluation mode; its mode is restored."""
        was_training, device, dtype = model.training, next(model.parameters()).device, dtype_of_rows(model)
        model.eval()
        losses, energies = [], []
        count = len(self._dataset)
        asked = torch.arange(len(self._levels)).split(self._rows)
        for rows, noise in zip(asked, self._noise.parts(self._rows), strict=True):
            batch = self._dataset.batch(rows % count).to(device, dtype)
            noise, levels = noise.to(device, dtype), self._levels[rows].to(device)
            noisy = self._process.noisy(batch.latents, noise, levels)
            answer = denoiser.call(model, noisy, self._process.timesteps(levels), batch.conditions)
            target = self._process.target(batch.latents, noise, levels)
            losses.append(denoising_losses(answer, target).cpu())
            energies.append(denoising_losses(torch.zeros_like(target), target).cpu())
        model.train(was_training)
        return ExamResult(*(torch.cat(found).reshape(-1, count).mean(dim=0) for found in (losses, energies)))


class _Noise:
    """Normal numbers of a shape, drawn again in the same order each time they are asked for, never all held.

    On a CPU, ``torch.randn`` fills blocks of 16 numbers; where rows are whole blocks, parts are those of one call.
    """

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator):
        self._shape, self._state = shape, generator.get_state()

    def __getitem__(self, row: int) -> Tensor:
        return next(itertools.islice(self.parts(1), row, None))[0]

    def parts(self, rows: int) -> Iterator[Tensor]:
        """Consecutive parts of ``rows`` rows."""
        generator = torch.Generator()
        generator.set_state(self._state)
        if math.prod(self._shape[1:]) % 16:
            yield from torch.randn(self._shape, generator=generator).split(rows)
            return
        for start in range(0, self._shape[0], rows):
            count = min(rows, self._shape[0] - start)
            yield torch.randn((count, *self._shape[1:]), generator=generator)
