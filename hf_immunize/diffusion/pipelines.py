"""Ordinary diffusers pipelines: load one from safetensors, find its denoiser, draw a random one of the same shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from hf_immunize.diffusion.denoisers import DENOISERS, denoiser_classes
from hf_immunize.errors import ModelError
from hf_immunize.models import refuse_folder, refuse_non_finite, variant_of
from hf_immunize.plugins import load_plugins


def load_pipeline(folder: str | Path, *, denoiser_dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of a folder, from safetensors only: denoiser and VAE in float32 whatever is stored, text encoders as
    they are stored, every weight finite.

    Args:
        folder: what ``save_pretrained`` wrote.
        denoiser_dtype: bfloat16 for a denoiser that stays frozen beside LoRA factors; it is read in that precision,
            without a copy in float32 in between.

    Raises:
        ModelError: what cannot be read, or not all of it; an adapter, a single file or pickles; NaN or infinity.
    """
    refuse_folder(folder)
    try:
        given: dict[str, Any] = dict(_text_encoders(Path(folder)))
        if denoiser_dtype != torch.float32:
            given["torch_dtype"] = {name: denoiser_dtype for name in _denoisers(Path(folder))}
        pipeline = DiffusionPipeline.from_pretrained(
            str(folder), use_safetensors=True, trust_remote_code=False, variant=_variant(Path(folder)), **given
        )
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # diffusers and transformers raise many unrelated classes for files that are broken
        raise ModelError(
            f"expected a diffusers pipeline saved with save_pretrained in {folder}, got {type(error).__name__}: "
            f"{error}: check the path."
        ) from error
    component_of(pipeline)
    hollow = [name for name, part in _networks(pipeline).items() if any(p.is_meta for p in part.parameters())]
    if hollow:
        raise ModelError(f"expected all weights of the pipeline in {folder}, got gaps in {hollow}: save it again.")
    for name, part in _networks(pipeline).items():
        refuse_non_finite(part, f"{name} of {folder}")
    if denoiser_dtype == torch.float32:
        # An attacker's optimizer, a teacher and a guard all need the digits; diffusers may come to keep what is stored.
        pipeline.register_modules(**{component_of(pipeline): _whole(getattr(pipeline, component_of(pipeline)))})
    _keep_class_names(pipeline)
    return pipeline


def _whole(denoiser: nn.Module) -> nn.Module:
    narrow = any(p.is_floating_point() and p.element_size() < 4 for p in denoiser.parameters())
    return denoiser.float() if narrow else denoiser


def _denoisers(folder: Path) -> list[str]:
    """Names of the parts of a pipeline's folder that are denoisers we know."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts = {name: entry[-1] for name, entry in index.items() if isinstance(entry, list)}
    known = denoiser_classes({str(kind) for kind in parts.values()})
    return [name for name, kind in parts.items() if kind in known]


def hollow_denoiser(folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The denoiser of a pipeline's folder on the meta device, from its config alone: shapes without weights.

    Raises:
        ModelError: no denoiser that is in ``DENOISERS``.
    """
    refuse_folder(folder)
    try:
        (name,) = _denoisers(Path(folder))
        config = json.loads((Path(folder) / name / "config.json").read_text(encoding="utf-8"))
        with torch.device("meta"):
            return denoiser_classes()[config["_class_name"]].from_config(config).to(dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"expected a pipeline with one denoiser among {sorted(kind.__name__ for kind in DENOISERS)} in {folder}, "
            f"got {type(error).__name__}: {error}: check the path."
        ) from error


def _variant(folder: Path) -> str | None:
    """The variant, e.g. ``fp16``, to ask for where some part has no plain weights. Raises ModelError for several."""
    parts = sorted(path for path in folder.iterdir() if path.is_dir())
    found = {name for part in parts if (name := variant_of(part)) is not None}
    if len(found) > 1:
        raise ModelError(f"expected one variant of weights in {folder}, got {sorted(found)}: save the pipeline again.")
    return found.pop() if found else None


def _text_encoders(folder: Path) -> dict[str, nn.Module]:
    """The models of transformers in a pipeline's folder. Raises ModelError for one whose file lacks weights.

    transformers draws such weights at random and warns; every load would then read prompts differently.
    """
    import transformers

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    found = {}
    for name, entry in index.items():
        library, kind = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        loader = getattr(transformers, str(kind), None) if library == "transformers" else None
        if loader is None or not any((folder / name).glob("*.safetensors")):
            continue
        model, told = loader.from_pretrained(
            folder / name, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            variant=variant_of(folder / name),
        )
        if told["missing_keys"]:
            raise ModelError(
                f"expected all weights of {name} in {folder}, got none for {sorted(told['missing_keys'])[:5]}: save "
                "the pipeline again."
            )
        found[name] = model
    return found


def _networks(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def differences(pipeline: Any, base: Any) -> list[str]:
    """What two pipelines do not share beside their denoisers: class, scheduler, weights or settings of other parts.

    Weights are compared as numbers, whatever files and precision they are kept in. An exam asks both pipelines about
    the same latents, prompts and noise, which makes sense only where nothing is left.
    """
    found = [] if type(pipeline) is type(base) else ["class"]
    mine, theirs = pipeline.components, base.components
    for name in sorted((mine.keys() | theirs.keys()) - {component_of(base)}):
        one, other = mine.get(name), theirs.get(name)
        if type(one) is not type(other) or _settings(one) != _settings(other):
            found.append(name)
        elif isinstance(one, nn.Module) and not _equal(one.state_dict(), other.state_dict()):
            found.append(name)
    return found


_KEPT_APART = ("dtype", "transformers_version", "architectures")


def _settings(part: Any) -> dict[str, Any]:
    """A part's config less what tells where, when and in which precision it was saved."""
    config: Any = getattr(part, "config", None)
    if hasattr(part, "get_vocab"):
        return {"vocabulary": part.get_vocab(), "length": part.model_max_length}
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    return {name: value for name, value in plain.items() if not name.startswith("_") and name not in _KEPT_APART}


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name].float(), other[name].float()) for name in one)


def _keep_class_names(pipeline: Any) -> None:
    """Have ``save_pretrained`` write the class names of a DiTPipeline, which it would lose otherwise."""
    names: dict[str, list[str]] = {}
    for name, number in (getattr(pipeline, "labels", None) or {}).items():
        names.setdefault(str(number), []).append(name)
    if names:
        pipeline.register_to_config(id2label={number: ", ".join(parts) for number, parts in names.items()})


def component_of(pipeline: Any) -> str:
    """Name of the pipeline's denoiser (``unet`` or ``transformer``).

    Raises:
        ModelError: none of the pipeline's components is in ``DENOISERS``, or several are.
    """
    parts = pipeline.components.items()
    if not any(type(part) in DENOISERS for _, part in parts):
        load_plugins()
    found = [name for name, part in parts if type(part) in DENOISERS]
    if len(found) != 1:
        told = {name: type(part).__name__ for name, part in parts if part is not None}
        raise ModelError(
            f"expected one denoiser among {sorted(kind.__name__ for kind in DENOISERS)} in the pipeline, got "
            f"{found or 'none'} of {told}."
        )
    return found[0]


def fresh_denoiser(model: nn.Module, seed: int) -> nn.Module:
    """The denoiser's architecture with random weights drawn from ``seed``: what training from scratch starts at."""
    kind: Any = type(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh, dtype = kind.from_config(model.config), next(model.parameters()).dtype
        # casting warns of layers to keep in float32 even where there is nothing to cast
        return fresh if fresh.dtype == dtype else fresh.to(dtype)
