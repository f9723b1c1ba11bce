"""Which linear layer of a classifier is its head."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from hf_immunize.errors import ModelError
from hf_immunize.features.capture import base_prefix

_LISTED = 8


def find_classifier(model: nn.Module) -> str:
    """Module name of the linear head of a classifier: the one ``nn.Linear`` with an output per label.

    It lies outside the base model of a transformers classifier; where the base holds the head too, as timm's models in
    transformers' wrapper do, it is what the base names by ``get_classifier``, else the one such layer inside.

    Raises:
        ModelError: no linear head, or more than one; the candidates are listed.
    """
    if (plain := under_adapters(model)) is not model:
        place = next(name for name, module in model.named_modules() if module is plain)
        return f"{place}.{find_classifier(plain)}"
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    inside = base_prefix(model)
    beside = _beside_adapters(model)
    fitting = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (labels is None or module.out_features == labels)
        and not name.startswith(beside)
    ]
    heads = [name for name in fitting if inside is None or not name.startswith(inside)]
    if not heads and inside is not None:
        heads = _named_by_base(model, inside) or [name for name in fitting if name.startswith(inside)]
    if len(heads) == 1:
        return heads[0]
    raise _not_one(model, heads, labels)


def under_adapters(model: nn.Module) -> Any:
    """The model that a ``PeftModel`` wraps, its adapters within; any other model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def _beside_adapters(model: nn.Module) -> tuple[str, ...]:
    """What names begin with of layers that PEFT put beside a model's own, or has put out of use."""
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            found.append(f"{name}.original_module")  # its copy is what runs, and what is trained
        elif hasattr(module, "base_layer"):
            found += [f"{name}.{part}" for part, _ in module.named_children() if part != "base_layer"]
    return tuple(found)


def _named_by_base(model: nn.Module, inside: str) -> list[str]:
    """The layer that a base in the manner of timm calls its classifier."""
    base = model.get_submodule(inside.rstrip("."))
    ask = getattr(base, "get_classifier", None)
    found = ask() if callable(ask) else None
    if not isinstance(found, nn.Linear):
        return []
    return [name for name, module in model.named_modules() if module is found][:1]


def _not_one(model: nn.Module, heads: list[str], labels: int | None) -> ModelError:
    kind = type(model).__name__
    got = f"{len(heads)} ({', '.join(heads[:_LISTED])})" if heads else "none"
    if len(heads) == 2 and any("distil" in name for name in heads):
        one = re.sub("WithTeacher$", "", kind)
        first = next(name for name in heads if "distil" not in name)
        copy = "" if first.startswith("classifier") else f"model.classifier.load_state_dict(two.{first}.state_dict()); "
        remedy = (
            "it was distilled and computes no loss. Make it a model of one head: "
            f"model = {one}.from_pretrained(FOLDER); {copy}model.save_pretrained(NEW)"
        )
    else:
        candidates = _candidates(model, labels)
        remedy = (
            f"name the layer whose input is to be measured with feature_module=...; candidates are {candidates}"
            if candidates
            else "use a classifier, or put a head on the backbone with hf_immunize.features.add_head"
        )
    return ModelError(f"expected one linear classification head in {kind}, got {got}: {remedy}.")


def _candidates(model: nn.Module, labels: int | None) -> list[str]:
    """Layers with an output per label, convolutions of one position included; else the last linear layers."""
    linear, fitting = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            linear.append(name)
        width = getattr(module, "out_features", None) or getattr(module, "out_channels", None)
        if labels is not None and isinstance(module, nn.Linear | nn.Conv2d) and width == labels:
            fitting.append(name)
    return (fitting or linear)[-_LISTED:]
