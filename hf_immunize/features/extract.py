"""Features of whole datasets at named modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from hf_immunize.errors import CaptureError
from hf_immunize.features.capture import Names, as_layouts, capture_inputs
from hf_immunize.features.finding import find_layouts
from hf_immunize.features.rows import RowLayout


def extract_features(model: nn.Module, batches: Iterable[dict[str, Tensor]], names: Names) -> dict[str, Tensor]:
    """Features at the named modules over whole batches in evaluation mode, concatenated on the CPU, N×D each.

    How an input becomes one row per image is tried on the first batch (``find_layouts``). Batches hold ``pixel_values``
    (other keys are ignored). The model's training mode is restored.

    Args:
        names: module names, or layouts by name.

    Raises:
        CaptureError: no batch at all, a hook that did not catch, or an input without one row per image.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in as_layouts(names)}
    for found in feature_batches(model, batches, names):
        for name, features in found.items():
            kept[name].append(features.cpu())
    return {name: torch.cat(parts) for name, parts in kept.items()}


def feature_batches(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], names: Names
) -> Iterator[dict[str, Tensor]]:
    """``extract_features`` batch by batch, on the model's device: what is not kept need not fit memory.

    The model is in evaluation mode until the last batch is taken (or the iterator is closed).
    """
    asked = as_layouts(names)
    layouts: dict[str, RowLayout] | None = None
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        for batch in batches:
            pixels = batch["pixel_values"].to(device)
            with torch.no_grad():
                with capture_inputs(model, layouts or asked) as caught:
                    model(pixel_values=pixels)
                if layouts is None:
                    layouts = find_layouts(model, asked, {"pixel_values": pixels})
                    caught.arrange(layouts)
                found = dict(caught.items())
            yield found
    finally:
        model.train(was_training)
    if layouts is None:
        raise CaptureError("expected at least one batch to extract features from, got none: the dataset is empty.")
