"""A classifier that is published as a PEFT adapter: merged into its base, as anybody who holds both can do."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from torch import nn

from hf_immunize.errors import ModelError
from hf_immunize.models.classifiers import load_classifier
from hf_immunize.models.folders import is_adapter
from hf_immunize.models.weights import refuse_non_finite

_WEIGHTS, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"
_PROCESSOR = "preprocessor_config.json"


def load_on_base(folder: str | Path, base: str | Path | None) -> nn.Module:
    """The classifier of a folder: a whole one, or an adapter put on ``base`` and merged, in float32.

    Whoever attacks an adapter holds its base, and merging changes nothing but the form. The result has the classes and
    the names of weights that the base has.

    Args:
        base: folder of the base; a whole classifier needs none.

    Raises:
        ModelError: what ``load_classifier`` refuses; an adapter without a base, without safetensors weights, with
            layers that the base does not have, of a kind that cannot be merged, or with weights that are no numbers.
    """
    path = Path(folder)
    if not is_adapter(path):
        return load_classifier(path)
    if base is None:
        raise ModelError(
            f"expected the folder of the base beside the PEFT adapter in {path}, got none: an adapter alone does not "
            "say which weights it changes. Name the model that it was trained on (adapter_base)."
        )
    _refuse_adapter(path)
    model = _merged(path, load_classifier(base))
    refuse_non_finite(model, str(path), remedy="restore the weights, or train the adapter again.")
    return model


def reads_images(folder: str | Path, base: str | Path | None) -> Path:
    """The folder whose image processor reads a model's images: an adapter without one is shown what its base is."""
    path = Path(folder)
    return Path(base) if base is not None and is_adapter(path) and not (path / _PROCESSOR).is_file() else path


def _refuse_adapter(path: Path) -> None:
    """Raise ModelError for an adapter whose loading would read a pickle or import what its configuration names."""
    if not (path / _WEIGHTS).is_file() or (path / _PICKLE).exists():
        raise ModelError(
            f"expected an adapter's weights in {_WEIGHTS} alone in {path}, got a pickle or none: save it again with "
            "save_pretrained(..., safe_serialization=True)."
        )
    try:
        told = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"expected an adapter's configuration in {path}, got {error}: save it again.") from error
    if not isinstance(told, dict) or told.get("megatron_config"):
        raise ModelError(
            f"expected a plain configuration of an adapter in {path}, got one that loads layers of another library: "
            "save the adapter without megatron_config."
        )


def _merged(path: Path, model: nn.Module) -> nn.Module:
    """The base with the adapter's updates added to its weights."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            put_on = PeftModel.from_pretrained(model, str(path), local_files_only=True, use_safetensors=True)
        merged: nn.Module = put_on.merge_and_unload(safe_merge=True)
    except MemoryError:
        raise
    except Exception as error:  # PEFT raises many unrelated classes for what does not fit
        raise ModelError(
            f"expected a PEFT adapter in {path} that fits its base and can be merged into it, got "
            f"{type(error).__name__}: {error}: check that it was trained on this base."
        ) from error
    return merged.requires_grad_(True)
