"""G: how hard the retain task can pull back, at every site and at the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_immunize.diffusion import Denoiser, denoising_losses
from hf_immunize.features import Captured, RowLayout, capture_inputs
from hf_immunize.training.core.distributed import gather_rows, world
from hf_immunize.training.core.sharding import is_sharded, settle, whole
from hf_immunize.training.diffusion.stream import NoisyBatch


class WrongTargetGradients:
    """Gradient norms of the retain loss when every row is asked for the next row's answer, of one step's batch.

    The counterpart of a classifier's loss with every label wrong (see ``TermWeights``): at a trained model the
    gradient of the true loss is close to nothing and would balance the terms away. A step's batch is that of all its
    micro-batches and ranks, so that it does not depend on how it is cut.
    """

    def __init__(self, denoiser: Denoiser, model: nn.Module, sites: Mapping[str, RowLayout]):
        self._denoiser, self._model, self._sites = denoiser, model, sites
        settle(model)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._squares: dict[str, list[Tensor]] = {site: [] for site in sites}
        self._sums: list[Tensor | None] = [None] * len(self._trained)
        self._count = 0

    def add(self, batch: NoisyBatch) -> None:
        """One micro-batch."""
        with torch.enable_grad(), capture_inputs(self._model, self._sites) as caught:
            # The input asks for a gradient so that every site has one, whatever is trained before it.
            noisy = batch.noisy.detach().requires_grad_()
            answer = self._denoiser.call(self._model, noisy, batch.timesteps, batch.conditions)
        everyone, mine = gather_rows(batch.target)
        loss = denoising_losses(answer, everyone.roll(1, 0)[mine]).mean()
        # What reads text alone, before any trained weight, has no gradient: nothing pulls back there.
        moved = [site for site in self._sites if caught.raw(site).requires_grad]
        found = self._gradients(loss, [caught.raw(site) for site in moved])
        for site, gradient in zip(moved, found, strict=False):
            self._squares[site].append(_pooled_norm(caught, site, gradient).square())
        for place, gradient in enumerate(found[len(moved) :]):
            if gradient is not None:
                held = self._sums[place]
                self._sums[place] = gradient.detach() if held is None else held + gradient
        self._count += 1

    def _gradients(self, loss: Tensor, features: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """At the features and at the trained weights; at split weights the mean over ranks, whole."""
        if not is_sharded(self._model):
            return torch.autograd.grad(loss, [*features, *self._trained], allow_unused=True)
        for value in features:
            value.retain_grad()
        loss.backward()  # FSDP2 leaves gradients at its own parameters only then
        settle(self._model)
        at_weights = [None if weight.grad is None else whole(weight.grad) for weight in self._trained]
        for weight in self._trained:
            weight.grad = None
        return [*(value.grad for value in features), *at_weights]

    def norms(self) -> tuple[dict[str, Tensor], Tensor]:
        """The norm over the global batch at the pooled features of each site, and at the trained weights."""
        place = self._trained[0] if self._trained else next(self._model.parameters())
        nothing = torch.zeros((), dtype=torch.float64, device=place.device)
        at_sites = {site: torch.stack(found).sum().sqrt() / self._count if found else nothing
                    for site, found in self._squares.items()}
        return at_sites, _mean_norm(self._sums) / self._count


def wrong_target_gradients(
    denoiser: Denoiser, model: nn.Module, batch: NoisyBatch, sites: Mapping[str, RowLayout]
) -> tuple[dict[str, Tensor], Tensor]:
    """``WrongTargetGradients`` of a step of one micro-batch."""
    found = WrongTargetGradients(denoiser, model, sites)
    found.add(batch)
    return found.norms()


def _pooled_norm(caught: Captured, site: str, gradient: Tensor) -> Tensor:
    """Norm over all ranks of the gradient at pooled features, that is of a shift of all tokens of an image at once.

    Each rank's loss is a mean over its own rows; the global mean divides by the number of ranks as well.
    """
    layout, images = caught.layout(site), caught.images(site)
    everywhere, _ = gather_rows(layout.rows(gradient, images) * layout.positions(gradient, images))
    return torch.linalg.vector_norm(everywhere.double()) / world()[1]


def _mean_norm(gradients: Sequence[Tensor | None]) -> Tensor:
    """Norm of the ranks' mean gradient."""
    flat = torch.cat([gradient.double().flatten() for gradient in gradients if gradient is not None])
    if world()[1] > 1:
        dist.all_reduce(flat)
    return torch.linalg.vector_norm(flat / world()[1])
