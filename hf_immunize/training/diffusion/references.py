"""G: how hard the retain task can pull back, at every site and at the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_immunize.diffusion import Denoiser, denoising_losses
from hf_immunize.features import Captured, RowLayout, capture_inputs
from hf_immunize.training.diffusion.stream import NoisyBatch
from hf_immunize.training.distributed import gather_rows, world


def wrong_target_gradients(
    denoiser: Denoiser, model: nn.Module, batch: NoisyBatch, sites: Mapping[str, RowLayout]
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient norms of the retain loss when every row is asked for the next row's answer.

    The counterpart of a classifier's loss with every label wrong (see ``TermWeights``): at a trained model the
    gradient of the true loss is close to nothing and would balance the terms away.

    Returns:
        the norm over the global batch at the pooled features of each site, and at the trained weights.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad(), capture_inputs(model, sites) as caught:
        # The input asks for a gradient so that every site has one, whatever is trained before it.
        noisy = batch.noisy.detach().requires_grad_()
        answer = denoiser.call(model, noisy, batch.timesteps, batch.conditions)
    everyone, mine = gather_rows(batch.target)
    loss = denoising_losses(answer, everyone.roll(1, 0)[mine]).mean()
    # What reads text alone, before any trained weight, has no gradient: nothing pulls back there.
    moved = [site for site in sites if caught.raw(site).requires_grad]
    found = torch.autograd.grad(loss, [*(caught.raw(site) for site in moved), *trained], allow_unused=True)
    norms = {site: loss.new_zeros(()).double() for site in sites}
    norms |= {site: _pooled_norm(caught, site, gradient) for site, gradient in zip(moved, found, strict=False)}
    return norms, _mean_norm(found[len(moved) :])


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
