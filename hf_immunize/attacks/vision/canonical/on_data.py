"""What only data tell of a network: statistics that no data have, and weights that nothing ever excites.

Both hide scales from whoever looks at weights alone. Running statistics that lie cost nothing in evaluation mode, and
make another network of the model as soon as it trains by the statistics of batches. A column of 10⁶ behind a unit that
never fires, or a colour that no image has, changes no output, and is what the length of its rows is made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

_AT_A_TIME = 16
_DRAWS = 8
"""Random sums over rows by which channels are compared (``twins``)."""
_ROUNDED = 1e-13
"""Variance in units of the mean square that is rounding of float64."""
ENOUGH = 32
"""Rows that have to be seen before an input counts as silent: a rectified unit is silent on half of them anyway."""
_NOTHING = 1e-10
"""Share of a row's output below which what an input adds to it is nothing: far below what outputs may move by."""


class Moments:
    """Sums of every channel over all rows that came by: of values, of squares, and with the same random weights."""

    def __init__(self) -> None:
        self.count = 0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0
        self.drawn: Tensor = torch.zeros(())
        """Channels × draws: sums over rows with normal weights."""
        self.ones: Tensor = torch.zeros(())
        """Those of a channel that is 1 on every row."""
        self.fired: Tensor = torch.zeros(())
        """How many values of a channel are not zero."""
        self._generator = torch.Generator().manual_seed(0)

    def add(self, values: Tensor) -> None:
        """``values``: anything × channels."""
        self.count += len(values)
        self.first = self.first + values.sum(dim=0)
        self.second = self.second + values.square().sum(dim=0)
        draws = torch.randn(len(values), _DRAWS, generator=self._generator, dtype=values.dtype)
        self.drawn, self.ones = self.drawn + values.T @ draws, self.ones + draws.sum(dim=0)
        self.fired = self.fired + (values != 0).sum(dim=0)

    @property
    def mean(self) -> Tensor:
        """Of every channel."""
        return torch.as_tensor(self.first) / self.count

    @property
    def square(self) -> Tensor:
        """Mean square of every channel."""
        return torch.as_tensor(self.second) / self.count


def rows_of(module: nn.Module, values: Tensor) -> Tensor:
    """Channels last, everything else in rows."""
    last = values if isinstance(module, nn.Linear) or values.dim() < 3 else values.movedim(1, -1)
    return last.reshape(-1, last.shape[-1])


@torch.no_grad()
def listen(
    model: nn.Module, images: Tensor, kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
) -> dict[Any, Moments]:
    """Every module of these kinds that runs, with the moments of its inputs.

    One with a forward of its own, as a convolution that standardises its kernels, may not be linear in its weights.
    """
    found: dict[Any, Moments] = {}

    def hear(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.setdefault(module, Moments()).add(rows_of(module, inputs[0]))

    plain = [module for module in model.modules() if any(type(module).forward is kind.forward for kind in kinds)]
    hooks = [module.register_forward_pre_hook(hear) for module in plain]
    run_with(hooks, model, images)
    return found


def has_own_forwards(model: nn.Module) -> bool:
    """Whether a kind of linear layer or convolution does something else than its class in torch."""
    return any(isinstance(part, kind) and type(part).forward is not kind.forward
               for part in model.modules() for kind in (nn.Linear, nn.Conv2d))


def run_with(hooks: Sequence[RemovableHandle], model: nn.Module, images: Tensor) -> None:
    """Forward all images a few at a time, and take the hooks away."""
    try:
        for batch in images.split(_AT_A_TIME):
            model(pixel_values=batch)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def refit_statistics(model: nn.Module, images: Tensor) -> int:
    """Give batch norms the statistics of these images, and the gains and shifts with which they compute what they did.

    μ, v of the images, m, s the running ones: γ' = γ√(v+ε)/√(s+ε), β' = β + γ(μ−m)/√(s+ε). In evaluation mode the
    function is the same; in training mode it then is nearly so too. A channel that does not vary has no scale that any
    image tells, and gets one of 1.

    Args:
        model: in evaluation mode, float64; changed in place.

    Returns:
        How many batch norms were looked at.
    """
    done = 0
    for norm, moments in listen(model, images, (_BatchNorm,)).items():
        if norm.running_mean is None or norm.running_var is None or norm.weight is None or norm.bias is None:
            continue
        mean, variance = moments.mean, moments.square - moments.mean.square()
        varies = variance > _ROUNDED * moments.square
        slope = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias + slope * (mean - norm.running_mean)
        norm.weight.copy_(torch.where(varies, slope * (variance + norm.eps).sqrt(), 1.0))
        norm.running_var.copy_(torch.where(varies, variance, 1.0))
        norm.bias.copy_(shift), norm.running_mean.copy_(mean)
        done += 1
    return done


@torch.no_grad()
def silence_unheard(heard: Mapping[Any, Moments]) -> int:
    """Set the weights of linear maps and convolutions to zero whose inputs add nothing to any row of the images heard.

    Where fewer than 32 rows (images, tokens, places) come by, nothing is.

    Args:
        heard: what came into each layer of a float64 model in evaluation mode (``listen``); changed in place.

    Returns:
        How many input channels were silenced that had weights.
    """
    done = 0
    for layer, moments in heard.items():
        if moments.count < ENOUGH:
            continue
        groups = getattr(layer, "groups", 1)
        weight = layer.weight.reshape(groups, layer.weight.shape[0] // groups, layer.weight.shape[1], -1)
        lengths = weight.square().sum(dim=-1)  # groups × rows × inputs
        added = lengths * moments.square.reshape(groups, 1, -1)
        unheard = (added <= _NOTHING**2 * added.sum(dim=-1, keepdim=True)).all(dim=1)
        unheard &= (lengths > 0).any(dim=1)
        layer.weight.copy_(weight.masked_fill(unheard[:, None, :, None], 0.0).view_as(layer.weight))
        done += int(unheard.sum())
    return done
