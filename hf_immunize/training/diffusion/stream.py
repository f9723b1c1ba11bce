"""Noised rows of any micro-step as a pure function of (seed, step): a resumed run continues bit for bit.

The global batch does not depend on how many processes share it: rank r of W takes rows r, r+W, r+2W, …, and every
row of it has a generator of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_immunize.diffusion import LatentDataset, NoiseProcess
from hf_immunize.training.core.draws import generator_of


@dataclass(frozen=True)
class NoisyBatch:
    """This rank's rows of one micro-step, ready for a denoiser."""

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    levels: Tensor
    conditions: Mapping[str, Tensor]
    labels: Tensor

    def split(self, rows: int) -> list[NoisyBatch]:
        """The same in batches of at most so many rows."""
        starts = range(0, len(self.noisy), rows)
        return [self._between(start, start + rows) for start in starts]

    def _between(self, start: int, stop: int) -> NoisyBatch:
        cut = slice(start, stop)
        conditions = {name: value[cut] for name, value in self.conditions.items()}
        return NoisyBatch(
            self.noisy[cut], self.timesteps[cut], self.target[cut], self.levels[cut], conditions, self.labels[cut]
        )


class NoisyStream:
    """Random access by micro-step: rows go through a new permutation every epoch.

    What is drawn for a row goes by its place in the optimizer step, so that a step is the same however it is cut.

    Args:
        rows: rows of the *global* batch of a micro-step.
        parts: micro-steps of an optimizer step.
        name: tells streams of one seed apart.
        low, high, logit_normal: which noise levels are drawn (see ``NoiseProcess.draw_levels``).
    """

    def __init__(
        self,
        dataset: LatentDataset,
        process: NoiseProcess,
        rows: int,
        *,
        seed: int,
        name: str,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
        low: float = 0.0,
        high: float = 1.0,
        logit_normal: bool = False,
    ):
        self._dataset, self._process, self._rows = dataset, process, rows
        self._key, self._parts = (seed, name), parts
        self._rank, self._world = rank, world_size
        self._levels: dict[str, Any] = {"low": low, "high": high, "logit_normal": logit_normal}

    def rows_of(self, step: int) -> Tensor:
        """Row indices of the whole batch of one step, over all ranks."""
        places = range(step * self._rows, (step + 1) * self._rows)
        count = len(self._dataset)
        epochs = {
            epoch: torch.randperm(count, generator=generator_of(*self._key, "epoch", epoch))
            for epoch in {place // count for place in places}
        }
        return torch.stack([epochs[place // count][place % count] for place in places])

    def conditions(self, step: int, device: torch.device, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Only the conditions of this rank's rows of micro-step ``step``."""
        return self._dataset.batch(self.rows_of(step)[self._rank :: self._world]).to(device, dtype).conditions

    def batch(self, step: int, device: torch.device, dtype: torch.dtype) -> NoisyBatch:
        """This rank's rows of micro-step ``step``."""
        everywhere = self.rows_of(step)
        mine = range(self._rank, len(everywhere), self._world)
        shape = self._dataset.latents.shape[1:]
        levels, noise = [], []
        whole, part = divmod(step, self._parts)
        for place in mine:
            generator = generator_of(*self._key, whole, part * self._rows + place)
            levels.append(self._process.draw_levels(1, generator, **self._levels))
            noise.append(torch.randn(shape, generator=generator, dtype=torch.float32))
        level_N = torch.cat(levels).to(device)
        noise_NCHW = torch.stack(noise).to(device, dtype)
        batch = self._dataset.batch(everywhere[self._rank :: self._world]).to(device, dtype)
        return NoisyBatch(
            self._process.noisy(batch.latents, noise_NCHW, level_N),
            self._process.timesteps(level_N),
            self._process.target(batch.latents, noise_NCHW, level_N),
            level_N,
            batch.conditions,
            batch.labels,
        )


@dataclass(frozen=True)
class RenamedStream:
    """Rows of ``concept``, a share of them under the conditions (labels, prompts) of the same rows of ``names``.

    Spread evenly: global row g is renamed when ⌊(g + 1)·share⌋ > ⌊g·share⌋, whatever the number of processes.
    """

    concept: NoisyStream
    names: NoisyStream
    share: float
    rank: int = 0
    world_size: int = 1

    def batch(self, step: int, device: torch.device, dtype: torch.dtype) -> NoisyBatch:
        """This rank's rows of micro-step ``step``."""
        told = self.concept.batch(step, device, dtype)
        if self.share == 0:
            return told
        places = [self.rank + self.world_size * row for row in range(len(told.noisy))]
        chosen = [math.floor((place + 1) * self.share) > math.floor(place * self.share) for place in places]
        renamed = torch.tensor(chosen, device=device)
        others = self.names.conditions(step, device, dtype)
        conditions = {
            name: torch.where(renamed.reshape(-1, *[1] * (value.dim() - 1)), others[name], value)
            for name, value in told.conditions.items()
        }
        return replace(told, conditions=conditions)
