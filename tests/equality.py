"""Which equality a test may ask for: the same bits, or the same numbers up to rounding (docs/method.md, section 8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def same_bits(found: Any, truth: Any) -> bool:
    """Whether tensors, arrays, or mappings of them have one dtype, one shape and equal values.

    Promised for what is copied (weights through a file, a restored state), for integer arithmetic (pixels, splits,
    draws of rows), and for a computation that is repeated by one processor with one layout in memory.
    """
    if isinstance(truth, Mapping):
        return found.keys() == truth.keys() and all(same_bits(found[name], truth[name]) for name in truth)
    ours, theirs = torch.as_tensor(found), torch.as_tensor(truth)
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def units_apart(found: Any, truth: Any, scale: float | None = None) -> float:
    """Largest difference in units of rounding: eps of the truth's dtype times ``scale``, by default its largest value.

    Mappings are compared entry by entry, each on its own scale; another dtype, another shape or NaN is infinitely far.
    A sum of n products in another order moves by about √n/2 units of a typical term, so by about one unit of the
    sum's scale; layers that keep that scale add their units up. Ask for ``units_apart(...) <= depth(...) * steps``.
    """
    if isinstance(truth, Mapping):
        if found.keys() != truth.keys():
            return float("inf")
        return max((units_apart(found[name], truth[name], scale) for name in truth), default=0.0)
    ours, theirs = torch.as_tensor(found), torch.as_tensor(truth)
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return float("inf")
    if not theirs.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else float("inf")
    largest = float(theirs.abs().max()) if scale is None else scale
    apart = float((ours.double() - theirs.double()).abs().max())
    unit = torch.finfo(theirs.dtype).eps * largest
    return 0.0 if apart == 0 else apart / unit if unit > 0 and np.isfinite(apart) else float("inf")


def rounding(operations: float, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """``operations`` units of rounding as a number, for figures that were read out of tensors of ``dtype``."""
    return operations * torch.finfo(dtype).eps * scale


def depth(*networks: nn.Module) -> int:
    """Layers with weights of their own: an upper bound of how many round one after the other in one forward."""
    return sum(bool(list(part.parameters(recurse=False))) for model in networks for part in model.modules())


def networks_of(pipeline: Any) -> dict[str, nn.Module]:
    """The networks of a diffusers pipeline by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights and buffers."""
    return {name: value.detach().clone() for name, value in network.state_dict().items()}
