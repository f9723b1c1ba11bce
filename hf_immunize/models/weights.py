"""What weights must be before anything is trained, attacked, judged or saved: numbers, and enough digits of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_immunize.errors import ModelError

_NAMED = 5
DIVERGED = "training diverged, and nothing was saved. Lower the learning rate or the strength."
"""What to do about weights that training ruined."""


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, one at a time: a state dict of a large model would be a second reference."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def non_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the floating-point tensors that hold a NaN or an infinity; each tensor is looked at once."""
    found = []
    for name, value in tensors:
        if value.is_meta or not (value.is_floating_point() or value.is_complex()):
            continue
        if not value.numel():
            continue
        finite = torch.isfinite(value.detach()).all()
        # Of a tensor that is split over ranks each sees its own part; all of them have to give one answer.
        if not bool(finite.full_tensor() if isinstance(finite, DTensor) else finite):
            found.append(name)
    return found


def non_finite_in_file(path: str | Path) -> list[str]:
    """Names of the tensors in a safetensors file that hold a NaN or an infinity; one tensor is in memory at a time.

    A file that is no safetensors file holds none; whoever loads it says what is wrong with it.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return non_finite((name, file.get_tensor(name)) for name in file.keys())
    except SafetensorError:
        return []


def refuse_non_finite(
    model: nn.Module, where: str, *, error: type[Exception] = ModelError, remedy: str = "restore the weights."
) -> None:
    """Raise ``error`` (ModelError) where a parameter or a buffer of ``model`` holds NaN or infinity.

    Args:
        where: what the model is called in the message.
        remedy: what to do.
    """
    everything = list(_tensors(model))
    if found := non_finite(everything):
        more = ", …" if len(found) > _NAMED else ""
        raise error(
            f"expected finite weights in {where}, got NaN or infinity in {len(found)} of {len(everything)} tensors "
            f"({', '.join(found[:_NAMED])}{more}): {remedy}"
        )


def refuse_below_float32(model: nn.Module, what: str) -> None:
    """Raise ModelError where a parameter that is trained has fewer digits than float32.

    An optimizer's small steps are lost in the rounding of float16 and bfloat16 weights, or overflow there: what looks
    like a slow or a failed training is then the storage format.
    """
    low = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.is_floating_point() and parameter.element_size() < 4
    ]
    if low:
        kind = str(model.get_parameter(low[0]).dtype).removeprefix("torch.")
        raise ModelError(
            f"expected trained weights of {what} in float32, got {kind} in {len(low)} parameters ({low[0]}, …): load "
            "with from_pretrained(..., dtype=torch.float32) and set bf16=True for speed; transformers loads weights "
            "in the precision they are stored in."
        )
