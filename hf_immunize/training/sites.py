"""Which layers' inputs the objective sees, and with which weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_immunize.errors import CaptureError, ConfigError, ModelError
from hf_immunize.features import capture_inputs, linear_sites


def choose_sites(
    model: nn.Module, patterns: str, weights: str | None, head: str | None, sample: Tensor
) -> dict[str, float]:
    """Site names and weights; layers that read the very same tensor (query and value of one block) count once.

    Without ``weights`` each of S sites has 1/S, so that ``strength`` means the same for any number of sites.

    Args:
        sample: one image, C×H×W; it is run through the model once.

    Raises:
        ModelError: patterns that fit nothing, or layers that no forward reaches.
        ConfigError: weights of sites that are not there.
    """
    found = linear_sites(model, patterns, head)
    if len(found) > 1 or patterns not in ("head", head):
        found = _different_inputs(model, found, sample)
    chosen = {site: 1.0 / len(found) for site in found}
    for part in weights.split(",") if weights else ():
        end, _, value = part.rpartition("=")
        fitting = [site for site in found if site == end.strip() or site.endswith(f".{end.strip()}")]
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not fitting or not number >= 0:
            raise ConfigError(f"expected site_weights like '{found[-1]}=0.5' of sites {found}, got {part!r}.")
        chosen |= {site: number for site in fitting}
    return chosen


def _different_inputs(model: nn.Module, names: list[str], sample: Tensor) -> list[str]:
    """Names whose inputs are different tensors, in order of registration. Layers that are never called are an error."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    seen: dict[tuple[int, int], str] = {}
    try:
        with torch.no_grad(), capture_inputs(model, names) as caught:
            model(pixel_values=sample[None].to(device))
        for name in names:
            value = caught.raw(name)
            # The kept tensors are alive, so that equal storage and offset mean the same tensor.
            seen.setdefault((value.data_ptr(), value.numel()), name)
    except CaptureError as error:
        raise ModelError(f"expected sites that every forward passes once: {error}") from error
    finally:
        model.train(was_training)
    return list(seen.values())
