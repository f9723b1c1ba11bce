"""Which layers' inputs the objective sees, with which weight, and how an input becomes one row per image."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_immunize.errors import CaptureError, ConfigError, ModelError
from hf_immunize.features import (
    RowLayout,
    capture_inputs,
    find_layouts,
    linear_sites,
    parse_layouts,
    under_adapters,
    unmoved_inputs,
)

logger = logging.get_logger(__name__)

_LABELS = ("labels", "label")


def choose_sites(
    model: nn.Module, patterns: str, weights: str | None, head: str | None, sample: Tensor
) -> dict[str, float]:
    """Site names and weights; layers that read the very same tensor (query and value of one block) count once.

    Of ``lora``, layers that are never called or whose input is the same for every image are left out, with a warning.

    Without ``weights`` each of S sites has 1/S, so that ``strength`` means the same for any number of sites.

    Args:
        sample: one image, C×H×W; it is run through the model.

    Raises:
        ModelError: patterns that fit nothing, or layers that no forward reaches.
        ConfigError: weights of sites that are not there.
    """
    found = linear_sites(model, patterns, head)
    if len(found) > 1 or patterns not in ("head", head):
        found = _different_inputs(model, found, sample, preset=patterns == "lora")
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


def choose_layouts(
    model: nn.Module, sites: Iterable[str], given: str | None, row: Mapping[str, Any]
) -> dict[str, RowLayout]:
    """How the input of every site becomes one row per image: as ``given`` says, else found; both tried on a real row.

    Args:
        given: ``site_layouts`` of ImmunizationConfig.
        row: of the primary dataset; what the forward does not take is left out.

    Raises:
        ModelError: a site whose input has no row per image, with its shape.
        ConfigError: layouts of sites that are not there, or that are none.
    """
    asked = parse_layouts(given, list(dict.fromkeys(sites)))
    try:
        return find_layouts(model, asked, inputs_of(model, row))
    except CaptureError as error:
        raise ModelError(str(error)) from error


def inputs_of(model: nn.Module, row: Mapping[str, Any]) -> dict[str, Tensor]:
    """A batch of one row, without labels and without what the forward does not take."""
    taken = inspect.signature(under_adapters(model).forward).parameters
    named = {name: value for name, value in row.items() if name in taken and name not in _LABELS}
    return {name: torch.as_tensor(value)[None] for name, value in named.items()}


def _different_inputs(model: nn.Module, names: list[str], sample: Tensor, *, preset: bool) -> list[str]:
    """Names whose inputs are different tensors, in order of registration.

    Of a ``preset``, layers that no forward passes (nn.MultiheadAttention reads their weights itself) and layers that
    read the same whatever the image (learned queries) are left out and said; named ones of the first kind are an error.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    seen: dict[tuple[int, int], str] = {}
    try:
        with torch.no_grad(), capture_inputs(model, names) as caught:
            model(pixel_values=sample[None].to(device))
        passed = [name for name in names if name in caught] if preset else names
        for name in passed:
            value = caught.raw(name)
            # The kept tensors are alive, so that equal storage and offset mean the same tensor.
            seen.setdefault((value.data_ptr(), value.numel()), name)
    except CaptureError as error:
        raise ModelError(f"expected sites that every forward passes once: {error}") from error
    finally:
        model.train(was_training)
    found = list(seen.values())
    unmoved = unmoved_inputs(model, found, {"pixel_values": sample[None]}) if preset else []
    silent = [name for name in names if name not in passed]
    for left, why in ((silent, "no forward passes them"), (unmoved, "no image changes their inputs")):
        if left:
            logger.warning(f"{len(left)} of {len(names)} layers are left out of the sites, since {why}: {left}.")
    if not (found := [name for name in found if name not in unmoved]):
        raise ModelError(f"expected sites whose inputs the images change, got none of {names}: name other modules.")
    return found
