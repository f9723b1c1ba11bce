"""G: how hard the primary task can pull back, at every site and at the trained weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from hf_immunize.errors import ConfigError
from hf_immunize.features import Captured
from hf_immunize.training.core.distributed import gather_rows, sum_over_ranks, world


class ReferenceGradients:
    """Norms of the gradient of a loss whose targets are all wrong, of one step's batch.

    At a trained model the gradient of the true loss is close to nothing and would balance the terms away; with wrong
    targets it is as large as the task can make it. A step's batch is that of all its micro-batches and ranks, so that G
    does not depend on how it is cut. At a site with several tokens, positions or windows per image the gradient is that
    of a shift of all of them: their sum.

    Args:
        sites: names of captured modules.
        trained: weights whose gradient norm is wanted too.
        optional: whether a site whose input depends on nothing that is trained has no say, or is an error.
    """

    def __init__(self, sites: Iterable[str], trained: Sequence[nn.Parameter] = (), *, optional: bool = False):
        self._squares: dict[str, list[Tensor]] = {site: [] for site in sites}
        self._trained, self._optional = list(trained), optional
        self._sums: list[Tensor | None] = [None] * len(self._trained)
        self._count = 0

    def add(self, loss: Tensor, caught: Captured) -> None:
        """One micro-batch.

        Raises:
            ConfigError: a site whose input depends on nothing that is trained, unless these are optional.
        """
        moved = []
        for site in self._squares:
            if caught.raw(site).requires_grad:
                moved.append(site)
            elif not self._optional:
                raise unmoved(site)
        asked = [*(caught.raw(site) for site in moved), *self._trained]
        found = torch.autograd.grad(loss, asked, allow_unused=True)
        for site, gradient in zip(moved, found, strict=False):
            whole = torch.zeros_like(caught.raw(site)) if gradient is None else gradient.detach()
            self._squares[site].append(_global_norm(caught.shift(site, whole)).square())
        for place, gradient in enumerate(found[len(moved) :]):
            if gradient is not None:
                held = self._sums[place]
                self._sums[place] = gradient.detach() if held is None else held + gradient
        self._count += 1

    def at_sites(self) -> dict[str, Tensor]:
        """The norm over the global batch at the features of each site; 0 where nothing pulls back."""
        # The mean over a step's micro-batches has the parts of each, divided by their number.
        return {site: torch.stack(found).sum().sqrt() / self._count if found else torch.zeros((), dtype=torch.float64)
                for site, found in self._squares.items()}

    def at_weights(self) -> Tensor:
        """The norm of the ranks' mean gradient at the trained weights."""
        found = [gradient.clone() for gradient in self._sums if gradient is not None]
        sum_over_ranks(found)
        squares = [torch.zeros((), dtype=torch.float64)]
        squares += [torch.linalg.vector_norm(gradient, dtype=torch.float64).square().cpu() for gradient in found]
        return torch.stack(squares).sum().sqrt() / (world()[1] * self._count)


def unmoved(site: str) -> ConfigError:
    """The error for a site that training cannot reach."""
    return ConfigError(
        f"expected sites whose inputs depend on what is trained, got '{site}': train modules before it "
        "(trainable_modules), or choose another site."
    )


def _global_norm(gradient: Tensor) -> Tensor:
    """Norm over the global batch of a gradient with one row per image."""
    everywhere, _ = gather_rows(gradient)
    # Each rank's loss is a mean over its own rows; the global mean divides by the number of ranks as well.
    return torch.linalg.vector_norm(everywhere.double()) / world()[1]
