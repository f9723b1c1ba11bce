"""Retain rows that are asked for another row's answer: what a denoiser's balance is measured by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from hf_immunize.diffusion import Denoiser, denoising_losses
from hf_immunize.features import RowLayout, capture_inputs
from hf_immunize.training.core.distributed import gather_rows
from hf_immunize.training.core.references import ReferenceGradients
from hf_immunize.training.core.sharding import settle
from hf_immunize.training.diffusion.stream import NoisyBatch


class WrongTargetGradients:
    """Gradient norms of the retain loss when every row is asked for the next row's answer, of one step's batch.

    The counterpart of a classifier's loss with every label wrong (see ``ReferenceGradients``).
    """

    def __init__(self, denoiser: Denoiser, model: nn.Module, sites: Mapping[str, RowLayout]):
        self._denoiser, self._model, self._sites = denoiser, model, sites
        trained = [parameter for parameter in settle(model).parameters() if parameter.requires_grad]
        # What reads text alone, before any trained weight, has no gradient: nothing pulls back there.
        self._found = ReferenceGradients(sites, trained, optional=True)

    def add(self, batch: NoisyBatch, wrong: Tensor) -> None:
        """One micro-batch, and the answers its rows are asked for."""
        with torch.enable_grad(), capture_inputs(self._model, self._sites) as caught:
            # The input asks for a gradient so that every site has one, whatever is trained before it.
            noisy = batch.noisy.detach().requires_grad_()
            answer = self._denoiser.call(self._model, noisy, batch.timesteps, batch.conditions)
            loss = denoising_losses(answer, wrong).mean()
        self._found.add(loss, caught)

    def norms(self) -> tuple[dict[str, Tensor], Tensor]:
        """The norm over the global batch at the pooled features of each site, and at the trained weights."""
        return self._found.at_sites(), self._found.at_weights()


def wrong_targets(batches: Sequence[NoisyBatch]) -> list[Tensor]:
    """For each micro-batch of this rank the target of the row before, in the order of the whole step."""
    gathered = [gather_rows(batch.target) for batch in batches]
    everyone = torch.cat([rows for rows, _ in gathered]).roll(1, 0)
    starts = [0, *accumulate(len(rows) for rows, _ in gathered)]
    return [everyone[start + mine] for start, (_, mine) in zip(starts, gathered, strict=False)]


def wrong_target_gradients(
    denoiser: Denoiser, model: nn.Module, batches: Sequence[NoisyBatch], sites: Mapping[str, RowLayout]
) -> tuple[dict[str, Tensor], Tensor]:
    """``WrongTargetGradients`` of a step of these micro-batches."""
    found = WrongTargetGradients(denoiser, model, sites)
    for batch, wrong in zip(batches, wrong_targets(batches), strict=True):
        found.add(batch, wrong)
    return found.norms()
