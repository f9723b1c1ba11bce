"""Images and prompts as examples of a pipeline: encoded once, by its own VAE and encoders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import diffusers
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_immunize.data.caching import cache_folder
from hf_immunize.data.fingerprint import digest_pixels
from hf_immunize.data.pixels import KEPT_BYTES
from hf_immunize.data.row_store import RowStore
from hf_immunize.diffusion.denoisers import PROMPT_READERS, denoiser_of, reader_of
from hf_immunize.diffusion.examples import LatentDataset, PromptConditions
from hf_immunize.diffusion.photos import Photos
from hf_immunize.diffusion.pipelines import component_of
from hf_immunize.errors import DataError, ModelError

_FORMAT = 1
"""Part of the key of what is kept on disk; raised when it changes its meaning."""
_IMAGES = 4
"""Images that go through the VAE together."""
_PROMPTS = 8
"""Encoded prompts that are remembered while rows are written, for those that are said again soon."""
_DIGESTS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def check_pipeline(pipeline: Any) -> None:
    """Raise ModelError for a pipeline class that no family reads prompts for, or one without a VAE."""
    if reader_of(pipeline) is None or getattr(pipeline, "vae", None) is None:
        known = sorted(kind.__name__ for kind in PROMPT_READERS)
        raise ModelError(f"expected a pipeline among {known} with a VAE, got {type(pipeline).__name__}.")


@torch.no_grad()
def encode_pixels(pipeline: Any, pixels: Tensor | Photos) -> Tensor:
    """Latents N×C×H×W float32 of pixels N×3×R×R in −1..1: the mode of the VAE's posterior, shifted and scaled.

    Raises:
        DataError: a resolution the VAE cannot halve often enough.
    """
    return torch.cat(list(_latents(pipeline, pixels)))


@torch.no_grad()
def _latents(pipeline: Any, pixels: Tensor | Photos) -> Iterator[Tensor]:
    """Latents of all images in order, a few at a time."""
    vae = pipeline.vae
    size, step = pixels.shape[-1], 2 ** len(vae.config.block_out_channels)  # latents of an even side
    if size % step:
        raise DataError(f"expected images whose side is a multiple of {step}, got {size}: set resolution.")
    config, shift = vae.config, getattr(vae.config, "shift_factor", None) or 0.0
    count = -(-pixels.shape[0] // _IMAGES)
    for part in tqdm(pixels.split(_IMAGES), total=count, desc="encode images", leave=False, disable=None):
        with torch.no_grad():  # a generator leaves the decorator's before it is asked
            latents = vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode().cpu()
        yield ((latents - shift) * config.scaling_factor).float()


@torch.no_grad()
def encode_prompt(pipeline: Any, prompt: str, size: int) -> PromptConditions:
    """Conditions of one row, on the CPU, for a prompt and square images of a side in pixels; known by the prompt.

    Raises:
        ModelError: a pipeline whose tokenizers or encoders are missing or do not fit.

    Encoders keep the dtype of their file, bf16 say; conditions are float32, whatever the run's precision.
    """
    kind, reader = type(pipeline), reader_of(pipeline)
    assert reader is not None, "see check_pipeline"
    try:
        encoder = getattr(pipeline, "text_encoder", None) or getattr(pipeline, "text_encoder_2", None)
        made = reader.prompt(pipeline, prompt, "cpu" if encoder is None else str(encoder.device))
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, OverflowError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"expected a {kind.__name__} with the tokenizers and text encoders it was published with, got "
            f"{type(error).__name__}: {error}."
        ) from error
    if reader.size is not None:
        made |= reader.size(pipeline, size)
    told = {name: (value.float() if value.is_floating_point() else value).cpu() for name, value in made.items()}
    return PromptConditions(told, prompt)


def encode(
    pipeline: Any, pixels: Tensor | Photos, prompt: str | Sequence[str], label: int | Sequence[int],
    names: Sequence[str], *, digests: Sequence[bytes] | None = None, keep_bytes: int = KEPT_BYTES,
) -> LatentDataset:  # fmt: skip
    """Latents of every image and its prompt's conditions, known by pixels and prompt.

    Prompt and label are those of all images, or one each. Each prompt is encoded once; a prompt that all images have is
    held once. What takes more than ``keep_bytes`` lies on disk (``RowStore``), where it is found again by other
    processes and later runs.

    Args:
        digests: of the images' pixels, where they are known.

    Raises:
        ModelError: see ``check_pipeline``.
        DataError: no prompt, a resolution the VAE cannot halve often enough, a VAE that does not fit the denoiser, or
            an unknown class.
    """
    check_pipeline(pipeline)
    rows, size = pixels.shape[0], pixels.shape[-1]
    prompts = [prompt] * rows if isinstance(prompt, str) else list(prompt)
    labels = torch.tensor([label] * rows if isinstance(label, int) else list(label))
    if empty := [names[label] for text, label in zip(prompts, labels.tolist(), strict=True) if not text.strip()]:
        option = f"{empty[0].split()[0]}_prompt"
        raise DataError(f"expected a prompt for the images of {empty[0]!r}, got none: give {option}.")
    digests = digests or [digest_pixels(row.numpy()) for part in pixels.split(_IMAGES) for row in part]
    known = [hashlib.sha256(digest + text.encode()).hexdigest() for digest, text in zip(digests, prompts, strict=True)]
    first = next(_latents(pipeline, pixels[:1] if isinstance(pixels, Tensor) else pixels.subset([0])))
    told = encode_prompt(pipeline, prompts[0], size)
    alike = len(set(prompts)) == 1
    held = {"": first} if alike else {"": first, **told}
    if rows * sum(value.numel() * value.element_size() for value in held.values()) > keep_bytes:
        store = _store(pipeline, pixels, [] if alike else prompts, list(told), known)
        made = LatentDataset.stored(store, [] if alike else list(told), labels, list(names), names[int(labels[0])],
                                    digests=known, shared=told if alike else None)  # fmt: skip
    else:
        latents, said = encode_pixels(pipeline, pixels), list(dict.fromkeys(prompts))
        each = [told, *(encode_prompt(pipeline, text, size) for text in said[1:])]
        places = torch.tensor([said.index(text) for text in prompts])
        conditions = {
            name: value.expand(rows, *value.shape[1:]) if alike else torch.cat([one[name] for one in each])[places]
            for name, value in told.items()
        }
        made = LatentDataset(latents, conditions, labels, list(names), names[int(labels[0])], digests=known)
    model = getattr(pipeline, component_of(pipeline))
    denoiser_of(model).check(model, made.latents, made.conditions)
    return made


def _store(
    pipeline: Any, pixels: Tensor | Photos, prompts: Sequence[str], names: Sequence[str], known: Sequence[str]
) -> RowStore:
    """Latents, and conditions of each row's prompt where there are prompts, on disk; written if they are not there."""
    words = f"{_FORMAT} {type(pipeline).__name__} {tuple(pixels.shape[1:])} {list(names)} {bool(prompts)}"
    digest = hashlib.sha256(f"{words} {_weights_digest(pipeline)} {diffusers.__version__}".encode())
    for each in known:
        digest.update(each.encode())
    size = pixels.shape[-1]

    def batches() -> Iterator[tuple[Tensor, ...]]:
        start = 0
        again = lru_cache(maxsize=_PROMPTS)(lambda text: encode_prompt(pipeline, text, size))
        for latents in _latents(pipeline, pixels):
            told = [again(text) for text in prompts[start : start + len(latents)]]
            start += len(latents)
            columns = (latents, *(torch.cat([one[name] for one in told]) for name in names if told))
            _refuse_not_finite(columns)
            yield columns

    return RowStore.open_or_write(cache_folder("encoded") / digest.hexdigest()[:32], batches(), pixels.shape[0])


def _refuse_not_finite(columns: Sequence[Tensor]) -> None:
    if not all(bool(torch.isfinite(column).all()) for column in columns if column.is_floating_point()):
        raise DataError("expected finite latents and conditions, got NaN or infinity: check the images and the VAE.")


def _weights_digest(pipeline: Any) -> str:
    """Hex SHA-256 over the weights of everything in a pipeline but its denoiser."""
    if pipeline not in _DIGESTS:
        digest, denoiser = hashlib.sha256(), component_of(pipeline)
        for name, part in sorted(pipeline.components.items()):
            if not isinstance(part, nn.Module) or name == denoiser:
                continue
            for key, value in sorted(part.state_dict().items()):
                digest.update(f"{name} {key} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        _DIGESTS[pipeline] = digest.hexdigest()
    return _DIGESTS[pipeline]
