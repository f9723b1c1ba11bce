"""G: how hard the primary task can pull back, at every site and at the trained weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_immunize.errors import ConfigError
from hf_immunize.features import Captured
from hf_immunize.linalg import to_double
from hf_immunize.training.core.distributed import sum_over_ranks, world


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
        found = self._gradients(loss, [caught.raw(site) for site in moved])
        shifts = []
        for site, gradient in zip(moved, found, strict=False):
            whole = torch.zeros_like(caught.raw(site)) if gradient is None else gradient.detach()
            shifts.append(caught.shift(site, whole))
        for site, square in zip(moved, _global_squares(shifts), strict=True):
            self._squares[site].append(square)
        for place, gradient in enumerate(found[len(moved) :]):
            if gradient is not None:
                held = self._sums[place]
                self._sums[place] = gradient.detach() if held is None else held + gradient
        self._count += 1

    def _gradients(self, loss: Tensor, features: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """At the features and at the trained weights; at weights that are split, the mean over ranks."""
        if not any(isinstance(weight, DTensor) for weight in self._trained):
            return torch.autograd.grad(loss, [*features, *self._trained], allow_unused=True)
        for value in features:
            value.retain_grad()
        loss.backward()  # FSDP2 brings gradients to its own parameters only then
        at_weights = [weight.grad for weight in self._trained]
        for weight in self._trained:
            weight.grad = None
        return [*(value.grad for value in features), *at_weights]

    def at_sites(self) -> dict[str, Tensor]:
        """The norm over the global batch at the features of each site; 0 where nothing pulls back."""
        # The mean over a step's micro-batches has the parts of each, divided by their number.
        return {site: torch.stack(found).sum().sqrt() / self._count if found else torch.zeros((), dtype=torch.float64)
                for site, found in self._squares.items()}

    def at_weights(self) -> Tensor:
        """The norm of the ranks' mean gradient at the trained weights."""
        # Of split weights: means over ranks already, of which each has a part.
        split = [gradient.to_local() for gradient in self._sums if isinstance(gradient, DTensor)]
        found = [g.clone() for g in self._sums if g is not None and not isinstance(g, DTensor)]
        sum_over_ranks(found)
        squares = [torch.zeros((), dtype=torch.float64)]
        squares += [torch.linalg.vector_norm(gradient, dtype=torch.float64).square().cpu() for gradient in found]
        if split:
            parts = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in split])
            sum_over_ranks([parts])
            squares.append(parts.sum().cpu() * world()[1] ** 2)
        return torch.stack(squares).sum().sqrt() / (world()[1] * self._count)


def unmoved(site: str) -> ConfigError:
    """The error for a site that training cannot reach."""
    return ConfigError(
        f"expected sites whose inputs depend on what is trained, got '{site}': train modules before it "
        "(trainable_modules), or choose another site."
    )


def _global_squares(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Square norms over the global batch of gradients with one row per image, by one sum over ranks."""
    if not gradients:
        return []
    squares = torch.stack([torch.linalg.vector_norm(to_double(gradient)).square() for gradient in gradients])
    sum_over_ranks([squares])
    # Each rank's loss is a mean over its own rows; the global mean divides by the number of ranks as well.
    return list(squares / world()[1] ** 2)
