"""Image classifiers and their processors, from a folder or the Hub."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

import hf_immunize.features.headed  # noqa: F401  (makes the Auto classes know models made by add_head)
from hf_immunize.errors import ModelError
from hf_immunize.features import find_classifier
from hf_immunize.models.folders import no_folder, refuse_folder, variant_of
from hf_immunize.models.weights import refuse_non_finite

_DRAWN = (
    "initializer_range", "initializer_factor", "init_std", "initializer_std", "layer_scale_init_value",
    "layerscale_value",
)  # fmt: skip
"""Entries of configs that say how widely weights are drawn."""


def load_classifier(
    source: str | Path, *, labels: Mapping[str, Any] | None = None, trust_remote_code: bool = False, **config: Any
) -> nn.Module:
    """The image classifier of a folder or Hub id: safetensors only, float32 whatever is stored, every weight finite.

    Args:
        source: folder of ``save_pretrained``, or Hub id.
        labels: ``id2label`` and ``label2id`` of a new head for a model that has none, or one of other classes; the
            head is drawn at random then, also where as many classes have other names. By default every weight has to
            be there.
        trust_remote_code: run model code that comes with the model.
        config: numbers of its config to change.

    Raises:
        ModelError: nothing that can be read, an adapter, a single file, pickles or quantized weights (with what to do
            about each), weights that are missing, or weights that are not finite.
    """
    refuse_folder(source)
    variant = variant_of(source) if Path(source).is_dir() else None
    try:
        trusted = {"trust_remote_code": trust_remote_code}
        known = AutoConfig.from_pretrained(str(source), **trusted, **(dict(labels or {}) | config))
        own = AutoConfig.from_pretrained(str(source), **trusted)
        model, told = AutoModelForImageClassification.from_pretrained(
            str(source), config=known, dtype=torch.float32, variant=variant, ignore_mismatched_sizes=labels is not None,
            use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True,
        )
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # transformers, safetensors and hub raise many unrelated classes for what cannot be read
        raise ModelError(
            f"expected an image classifier saved with save_pretrained in {source}, weights in safetensors, got "
            f"{type(error).__name__}: {error}: check the path."
        ) from error
    if labels is None and told["missing_keys"]:
        missing = sorted(told["missing_keys"])
        raise ModelError(
            f"expected all weights of {type(model).__name__} in {source}, got none for {missing[:5]}: transformers "
            "would draw them at random. A backbone without a head gets one from hf-immunize pretrain or "
            "hf_immunize.features.add_head."
        )
    refuse_non_finite(model, str(source), remedy="restore the weights, or train the model again.")
    if labels is not None and _means_others(own, known):
        _draw_head(model)
    return model


def _means_others(own: Any, known: Any) -> bool:
    """Whether outputs that have names stand for other classes, or for the same in another order."""
    names, wanted = ([str(name) for _, name in sorted((one.id2label or {}).items())] for one in (own, known))
    return names != wanted and not all(name == f"LABEL_{place}" for place, name in enumerate(names))


@torch.no_grad()
def _draw_head(model: nn.Module) -> None:
    """Random weights, as the architecture draws them, for what has an output of each class: in place."""
    config: Any = copy.deepcopy(model.config)
    try:
        fresh = type(model)(config)
        config.num_labels = config.num_labels + 1
        with torch.device("meta"):
            other = dict(type(model)(config).named_parameters())
    except Exception:  # a class that is not made of its config alone, or not without numbers
        model.get_submodule(find_classifier(model)).reset_parameters()  # type: ignore[operator]
        return
    for (name, value), drawn in zip(model.named_parameters(), fresh.parameters(), strict=True):
        if other[name].shape != value.shape:
            value.copy_(drawn)


def random_classifier(
    source: str | Path, seed: int | None, trust_remote_code: bool = False, *, as_usual: bool = False, **changes: Any
) -> nn.Module:
    """The architecture of ``source`` with random float32 weights: where training from scratch starts.

    Args:
        seed: what the weights are drawn from; None goes on from torch's own generator.
        as_usual: with the spread that the architecture has by default, whatever the config says: whoever made a model
            wrote its config, and an attacker need not draw badly because it says so.
        changes: entries of the config to replace.

    Raises:
        ModelError: no config of an image classifier.
    """
    trusted = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(str(source), **changes, **trusted)
        if as_usual:
            _draw_as_usual(config)
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            return AutoModelForImageClassification.from_config(config, dtype=torch.float32, **trusted)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"expected the config of an image classifier in {source}, got {error}: check the path."
        ) from error


def _draw_as_usual(config: Any) -> None:
    """Give a config the values of its class that say how widely weights are drawn."""
    try:
        usual = type(config)()
    except (TypeError, ValueError):  # one that has no defaults
        return
    for name in _DRAWN:
        if hasattr(config, name) and hasattr(usual, name):
            setattr(config, name, getattr(usual, name))


def label_maps(names: Sequence[str]) -> dict[str, dict[Any, Any]]:
    """The two entries of a config that name a head's outputs."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}


def load_processor(
    source: str | Path, *, config_of: str | Path | None = None, trust_remote_code: bool = False
) -> Any:
    """The image processor saved beside a model, PIL backend, brought to the channels of that model.

    A processor that was made for colour and saved beside a model of one channel would fail; its equal means become one.

    Args:
        config_of: the model, where it lies elsewhere.

    Raises:
        ModelError: no processor, or one whose means differ by channel for a model of one.
    """
    try:
        found = AutoImageProcessor.from_pretrained(str(source), backend="pil", trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        where = "" if Path(source).exists() else no_folder(source)
        raise ModelError(
            f"expected an image processor in {source}, got {where}{type(error).__name__}: {error}: save it beside the "
            "model with save_pretrained."
        ) from error
    try:
        known = AutoConfig.from_pretrained(str(config_of or source), trust_remote_code=trust_remote_code)
    except (OSError, ValueError):  # a processor alone; whoever loads the model says what is wrong with that
        return found
    return _with_channels(found, getattr(getattr(known, "vision_config", known), "num_channels", None), str(source))


def _with_channels(processor: Any, channels: int | None, where: str) -> Any:
    if channels not in (1, 3):
        return processor
    for name in ("image_mean", "image_std"):
        values = getattr(processor, name, None)
        if not isinstance(values, list | tuple) or len(values) == channels:
            continue
        if len(set(values)) > 1:
            raise ModelError(
                f"expected {name} of {channels} numbers in the image processor of {where}, for a model of {channels} "
                f"channels, got {list(values)}: save the processor that the model was trained with."
            )
        setattr(processor, name, list(values[:1]) * channels)
    if channels == 1 and getattr(processor, "do_convert_rgb", None):
        processor.do_convert_rgb = False
    return processor
