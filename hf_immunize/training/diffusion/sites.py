"""Which layers' inputs the objective sees in a denoiser, and how an input becomes one row per image."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_immunize.diffusion import Denoiser
from hf_immunize.errors import CaptureError, ModelError
from hf_immunize.features import RowLayout, capture_inputs, find_layouts, parse_layouts
from hf_immunize.training.diffusion.stream import NoisyBatch


def attention_projections(denoiser: Denoiser, model: nn.Module) -> list[str]:
    """Names of the linear attention projections, in order of registration."""
    ends = tuple(f".{part}" for part in denoiser.attention)
    return [
        name for name, module in model.named_modules()
        if name.endswith(ends) and isinstance(getattr(module, "base_layer", module), nn.Linear)
    ]


def choose_sites(denoiser: Denoiser, model: nn.Module, patterns: str, sample: NoisyBatch) -> list[str]:
    """Site names: what ``patterns`` means (see DiffusionImmunizationConfig.sites), less what teaches nothing new.

    Layers that read the very same tensor (query, key and value of one self-attention) count once; layers whose input
    no weight of the denoiser can change (keys and values of cross-attention, which read text embeddings) are left out.

    Raises:
        ModelError: a pattern that fits nothing, a layer that no forward reaches, or no site left.
    """
    names = [name for name, _ in model.named_modules()]
    chosen: set[str] = set()
    for part in (part.strip() for part in patterns.split(",")):
        if part == "attention":
            found = attention_projections(denoiser, model)
        elif part == "middle":
            found = [denoiser.middle(model)]
        else:
            found = [name for name in names if part and (name == part or name.endswith(f".{part}"))]
        if not found:
            raise ModelError(
                f"expected modules of {type(model).__name__} for site {part!r}, got none: use 'attention', 'middle' or "
                "ends of names in dict(model.named_modules())."
            )
        chosen |= set(found)
    return _telling(denoiser, model, [name for name in names if name in chosen], sample)


def choose_layouts(
    denoiser: Denoiser, model: nn.Module, sites: list[str], given: str | None, sample: NoisyBatch
) -> dict[str, RowLayout]:
    """How the input of every site becomes one row per image: as ``given`` says, else found; both tried on real rows.

    What stands for another image is noisier, at another timestep and under other conditions.

    Raises:
        ModelError: a site whose input has no row per image, with its shape.
        ConfigError: layouts of sites that are not there, or that are none.
    """
    inputs = {"": sample.noisy, "timesteps": sample.timesteps, **sample.conditions}
    noise = torch.Generator().manual_seed(0)
    others = {
        name: value + torch.randn(value.shape, generator=noise).to(value) if value.is_floating_point()
        else value.flip(0)
        for name, value in inputs.items()
    }  # fmt: skip
    others["timesteps"] = torch.where(sample.timesteps < 10, sample.timesteps + 5, sample.timesteps - 5)

    def forward(batch: Mapping[str, Tensor]) -> Tensor:
        conditions = {name: value for name, value in batch.items() if name in sample.conditions}
        return denoiser.call(model, batch[""], batch["timesteps"], conditions)

    try:
        return find_layouts(model, parse_layouts(given, sites), inputs, others=others, forward=forward)
    except CaptureError as error:
        raise ModelError(str(error)) from error


def _telling(denoiser: Denoiser, model: nn.Module, names: list[str], sample: NoisyBatch) -> list[str]:
    seen: dict[tuple[int, int], str] = {}
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    try:
        model.requires_grad_(True)  # what could be changed, whatever is trained in this run
        with torch.enable_grad(), capture_inputs(model, names) as caught:
            denoiser.call(model, sample.noisy, sample.timesteps, sample.conditions)
        for name in names:
            value = caught.raw(name)
            if value.requires_grad:
                # The kept tensors are alive, so that equal storage and size mean the same tensor.
                seen.setdefault((value.data_ptr(), value.numel()), name)
    except CaptureError as error:
        raise ModelError(f"expected sites that every forward passes once: {error}") from error
    finally:
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
    if not seen:
        raise ModelError(f"expected sites whose inputs the denoiser's weights can change, got none of {names}.")
    return list(seen.values())
