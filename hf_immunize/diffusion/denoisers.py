"""How each class of denoiser is called: a table keyed by class, so that no structure is guessed from names.

Shape legend: N rows, C×H×W latents, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

from hf_immunize.errors import DataError, ModelError

Conditions = Mapping[str, Tensor]
Call = Callable[[nn.Module, Tensor, Tensor, Conditions], Tensor]
FLUX_GUIDANCE = 3.5
"""Guidance that a distilled Flux is told during training, unless the conditions hold ``guidance``."""


@dataclass(frozen=True)
class Denoiser:
    """One entry of ``DENOISERS``.

    Args:
        component: name under which pipelines hold it.
        needs: names of the conditioning tensors (N rows each) that a batch must hold, given the model.
        call: the answer in the shape of the latents, from the model (wrapped or not), noisy latents, timesteps and
            conditions. Rows are in float32 or wider; a model of narrower weights is given them in its own precision.
        middle: module whose input stands for mid-block features, given the bare model.
        attention: last parts of the names of the attention projections an attacker trains by default.
        classes: number of class labels the bare model knows, None where it is told none.
    """

    component: str
    needs: Callable[[nn.Module], tuple[str, ...]]
    call: Call
    middle: Callable[[nn.Module], str]
    attention: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    classes: Callable[[nn.Module], int | None] = lambda _: None

    def check(self, model: nn.Module, latents: Tensor, conditions: Conditions) -> None:
        """Raise DataError unless the model can be asked about latents and conditions; ``probe`` asks."""
        channels = model.config.in_channels // (4 if isinstance(model, FluxTransformer2DModel) else 1)
        if latents.dim() != 4 or latents.shape[1] != channels:
            raise DataError(
                f"expected N x {channels} x H x W latents for {type(model).__name__}, got {tuple(latents.shape)}: "
                "encode the images with the VAE of the same pipeline."
            )
        missing = [name for name in self.needs(model) if name not in conditions]
        if missing:
            raise DataError(
                f"expected conditions {list(self.needs(model))} for {type(model).__name__}, got none for {missing}: "
                "encode captions or class labels with the same pipeline."
            )
        known = self.classes(model)
        if known is not None and "class_labels" in conditions:
            labels = conditions["class_labels"]
            if int(labels.min()) < 0 or int(labels.max()) >= known:
                raise DataError(
                    f"expected class labels in 0..{known - 1} for {type(model).__name__}, got {int(labels.min())}.."
                    f"{int(labels.max())}: the model has no embedding for them. Check the labels."
                )

    def probe(self, model: nn.Module, latents: Tensor, conditions: Conditions) -> None:
        """Ask the bare model about the first row, where it is, in evaluation mode.

        Raises:
            DataError: what ``check`` finds, or sizes of latents or embeddings that the model cannot take.
        """
        self.check(model, latents, conditions)
        place, dtype, was_training = next(model.parameters()), dtype_of_rows(model), model.training
        first = {name: value[:1] for name, value in {**conditions, "": latents}.items()}
        first = {name: value.to(place.device, dtype if value.is_floating_point() else None)
                 for name, value in first.items()}
        row = first.pop("")
        shapes = {"latents": tuple(row.shape[1:])} | {name: tuple(value.shape[1:]) for name, value in first.items()}
        try:
            with torch.no_grad():
                answer = self.call(model.eval(), row, torch.zeros(1, dtype=torch.long, device=place.device), first)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise DataError(
                f"expected rows of a size that {type(model).__name__} takes, got {shapes}: {error}. Encode images and "
                "captions with the pipeline of this model, at a resolution it knows."
            ) from error
        finally:
            model.train(was_training)
        if answer.shape != row.shape:
            raise DataError(
                f"expected answers of {type(model).__name__} in the shape of the latents, {tuple(row.shape[1:])}, got "
                f"{tuple(answer.shape[1:])}: encode the images at a resolution the model knows."
            )


def dtype_of_rows(model: nn.Module) -> torch.dtype:
    """What noise, latents and targets are computed in for this model: float32, or what is wider of its own.

    A frozen base in bfloat16 does not make the question coarser, only the answer.
    """
    return torch.promote_types(next(model.parameters()).dtype, torch.float32)


def _in_own_precision(call: Call) -> Call:
    """``call`` with latents and floating-point conditions in the precision of the model's weights; timesteps stay."""

    @wraps(call)
    def called(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        dtype = next(model.parameters()).dtype
        if not dtype.is_floating_point or noisy.dtype.itemsize <= dtype.itemsize:
            return call(model, noisy, timesteps, conditions)
        told = {name: one.to(dtype) if one.is_floating_point() else one for name, one in conditions.items()}
        return call(model, noisy.to(dtype), timesteps, told)

    return called


def _bare(model: nn.Module) -> nn.Module:
    return model.module if hasattr(model, "module") else model


@_in_own_precision
def _unet(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    return model(noisy, timesteps, class_labels=conditions.get("class_labels"), return_dict=False)[0]


@_in_own_precision
def _text_unet(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    added = {name: conditions[name] for name in ("text_embeds", "time_ids") if name in conditions}
    return model(
        noisy,
        timesteps,
        encoder_hidden_states=conditions["encoder_hidden_states"],
        encoder_attention_mask=conditions.get("encoder_attention_mask"),
        class_labels=conditions.get("class_labels"),
        added_cond_kwargs=added or None,
        return_dict=False,
    )[0]


@_in_own_precision
def _dit(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    answer = model(noisy, timestep=timesteps, class_labels=conditions["class_labels"], return_dict=False)[0]
    return answer[:, : noisy.shape[1]]  # the second half, where there is one, is a learned variance


@_in_own_precision
def _pixart(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    answer = model(
        noisy,
        encoder_hidden_states=conditions["encoder_hidden_states"],
        encoder_attention_mask=conditions.get("encoder_attention_mask"),
        timestep=timesteps,
        added_cond_kwargs={name: conditions.get(name) for name in ("resolution", "aspect_ratio")},
        return_dict=False,
    )[0]
    return answer[:, : noisy.shape[1]]


@_in_own_precision
def _sd3(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    return model(
        hidden_states=noisy,
        encoder_hidden_states=conditions["encoder_hidden_states"],
        pooled_projections=conditions["pooled_projections"],
        timestep=timesteps.to(_exact(noisy)),
        return_dict=False,
    )[0]


def _exact(noisy: Tensor) -> Tensor:
    """Device and dtype for times and places: bfloat16 would round timestep 999 to 1000."""
    return noisy.new_empty((), dtype=torch.promote_types(noisy.dtype, torch.float32))


@_in_own_precision
def _flux(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    rows, channels, height, width = noisy.shape
    text = conditions["encoder_hidden_states"]
    guidance = None
    if _bare(model).config.guidance_embeds:
        guidance = conditions.get("guidance", torch.full((rows,), FLUX_GUIDANCE)).to(_exact(noisy))
    answer = model(
        hidden_states=pack_patches(noisy),
        encoder_hidden_states=text,
        pooled_projections=conditions["pooled_projections"],
        timestep=timesteps.to(_exact(noisy)) / 1000,  # the model multiplies by 1000 itself
        img_ids=patch_places(height // 2, width // 2).to(_exact(noisy)),
        txt_ids=torch.zeros(text.shape[1], 3).to(_exact(noisy)),
        guidance=guidance,
        return_dict=False,
    )[0]
    return unpack_patches(answer, height, width)


def pack_patches(latents: Tensor) -> Tensor:
    """N×C×H×W as N×(HW/4)×4C: each 2×2 patch becomes one token (Flux)."""
    rows, channels, height, width = latents.shape
    patches = latents.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(rows, height * width // 4, 4 * channels)


def unpack_patches(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of ``pack_patches``."""
    rows, _, depth = tokens.shape
    patches = tokens.reshape(rows, height // 2, width // 2, depth // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(rows, depth // 4, height, width)


def patch_places(height: int, width: int) -> Tensor:
    """(0, row, column) of each token, as Flux's rotary embedding wants it."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)


def _class_count(model: nn.Module) -> int | None:
    return getattr(model.config, "num_class_embeds", None)


def _class_labels(model: nn.Module) -> tuple[str, ...]:
    return ("class_labels",) if getattr(model.config, "num_class_embeds", None) is not None else ()


def _text_unet_needs(model: nn.Module) -> tuple[str, ...]:
    added = ("text_embeds", "time_ids") if model.config.addition_embed_type == "text_time" else ()
    return ("encoder_hidden_states", *added, *_class_labels(model))


def _pixart_needs(model: nn.Module) -> tuple[str, ...]:
    added = ("resolution", "aspect_ratio") if model.use_additional_conditions else ()
    return ("encoder_hidden_states", *added)


def _pooled_text(_: nn.Module) -> tuple[str, ...]:
    return ("encoder_hidden_states", "pooled_projections")


def _middle_block(model: nn.Module) -> str:
    # The block's first normalisation reads the block's input, and is called with it by position in every class here.
    return f"transformer_blocks.{len(model.transformer_blocks) // 2}.norm1"


_JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

DENOISERS: dict[type, Denoiser] = {
    UNet2DModel: Denoiser("unet", _class_labels, _unet, lambda _: "mid_block", classes=_class_count),
    UNet2DConditionModel: Denoiser(
        "unet", _text_unet_needs, _text_unet, lambda _: "mid_block", classes=_class_count
    ),
    DiTTransformer2DModel: Denoiser(
        "transformer", lambda _: ("class_labels",), _dit, _middle_block,
        classes=lambda model: model.config.num_embeds_ada_norm,
    ),
    PixArtTransformer2DModel: Denoiser("transformer", _pixart_needs, _pixart, _middle_block),
    SD3Transformer2DModel: Denoiser("transformer", _pooled_text, _sd3, _middle_block, _JOINT),
    FluxTransformer2DModel: Denoiser("transformer", _pooled_text, _flux, _middle_block, _JOINT),
}


def denoiser_of(model: nn.Module) -> Denoiser:
    """Entry of the table for a bare model. Raises ModelError for a class that is not in it."""
    found = DENOISERS.get(type(model))
    if found is None:
        known = sorted(kind.__name__ for kind in DENOISERS)
        raise ModelError(
            f"expected a denoiser among {known}, got {type(model).__name__}: add an entry that says how it is called "
            "to hf_immunize.diffusion.DENOISERS."
        )
    return found
