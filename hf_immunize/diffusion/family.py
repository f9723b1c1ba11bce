"""What a family of denoisers is: how its model is called, and how its pipelines read a prompt. One file each.

Shape legend: N rows, C×H×W latents, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.errors import DataError

Conditions = Mapping[str, Tensor]
Call = Callable[[nn.Module, Tensor, Tensor, Conditions], Tensor]
Told = dict[str, Tensor]


@dataclass(frozen=True)
class Denoiser:
    """How denoisers of one class are asked.

    Args:
        component: name under which pipelines hold it.
        needs: names of the conditioning tensors (N rows each) that a batch must hold, given the model.
        call: the answer in the shape of the latents, from the model (wrapped or not), noisy latents, timesteps and
            conditions. Rows are in float32 or wider; a model of narrower weights is given them in its own precision.
        middle: module whose input stands for mid-block features, given the bare model.
        attention: last parts of the names of the attention projections an attacker trains by default.
        classes: number of class labels the bare model knows, None where it is told none.
        channels: C of its latents, given the bare model.
        side: H, or H and W, of the latents it was made for, given the bare model.
        tokens: T of a prompt, for what is planned before there is any.
        shift: of the noise levels, from the scheduler's config and the latents' H and W, where the scheduler says that
            it depends on them (``use_dynamic_shifting``).
    """

    component: str
    needs: Callable[[nn.Module], tuple[str, ...]]
    call: Call
    middle: Callable[[nn.Module], str]
    attention: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    classes: Callable[[Any], int | None] = lambda _: None
    channels: Callable[[Any], int] = lambda model: model.config.in_channels
    side: Callable[[Any], int | tuple[int, int]] = lambda model: model.config.sample_size
    tokens: int = 77
    shift: Callable[[Any, int, int], float] = lambda config, height, width: shift_by_patches(config, height, width)

    def check(self, model: nn.Module, latents: Tensor, conditions: Conditions) -> None:
        """Raise DataError unless the model can be asked about latents and conditions; ``probe`` asks."""
        channels = self.channels(model)
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


def in_own_precision(call: Call) -> Call:
    """``call`` with latents and floating-point conditions in the precision of the model's weights; timesteps stay."""

    @wraps(call)
    def called(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        dtype = next(model.parameters()).dtype
        if not dtype.is_floating_point or noisy.dtype.itemsize <= dtype.itemsize:
            return call(model, noisy, timesteps, conditions)
        told = {name: one.to(dtype) if one.is_floating_point() else one for name, one in conditions.items()}
        return call(model, noisy.to(dtype), timesteps, told)

    return called


@dataclass(frozen=True)
class PromptReader:
    """How one class of pipeline tells its denoiser what to draw.

    Args:
        prompt: one row of conditions, by the denoiser's names, from the pipeline, a prompt and a device.
        size: what the denoiser is told of square images of a side in pixels, from the pipeline and the side; None where
            it is told nothing.
    """

    prompt: Callable[[Any, str, str], Told]
    size: Callable[[Any, int], Told] | None = None


@dataclass(frozen=True)
class DenoiserFamily:
    """One class of denoisers.

    Args:
        kind: the class, as diffusers has it.
        denoiser: how it is called.
        pipelines: classes of pipelines that read prompts for it; none for denoisers in pixel space.
    """

    kind: type
    denoiser: Denoiser
    pipelines: Mapping[type, PromptReader] = field(default_factory=dict)


def bare(model: nn.Module) -> nn.Module:
    """The model without what wraps it for several devices."""
    return getattr(model, "module", model)


def middle_block(model: nn.Module) -> str:
    """The middle one of ``transformer_blocks``.

    The block's first normalisation reads the block's input, and is called with it by position in every class here.
    """
    blocks: Any = model.transformer_blocks
    return f"transformer_blocks.{len(blocks) // 2}.norm1"


def class_count(model: nn.Module) -> int | None:
    """Class labels that the config names."""
    return getattr(model.config, "num_class_embeds", None)


def class_labels(model: nn.Module) -> tuple[str, ...]:
    """The condition of a model that is told class labels."""
    return ("class_labels",) if class_count(model) is not None else ()


def pooled_text(_: nn.Module) -> tuple[str, ...]:
    """The conditions of a model that is told the tokens of a text, and one vector for all of it."""
    return ("encoder_hidden_states", "pooled_projections")


def exact(noisy: Tensor) -> Tensor:
    """Device and dtype for times and places: bfloat16 would round timestep 999 to 1000."""
    return noisy.new_empty((), dtype=torch.promote_types(noisy.dtype, torch.float32))


def shift_by_patches(config: Any, height: int, width: int) -> float:
    """The shift of Flux, whose tokens are patches of 2×2 latents: linear in their number."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift  # brings transformers

    return calculate_shift(
        height * width // 4, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )


JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Attention projections of blocks that attend to image and text together."""
