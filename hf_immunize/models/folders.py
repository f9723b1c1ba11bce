"""What a model's folder holds in the place of a whole model, said before a loader trips over it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hf_immunize.errors import ModelError

_SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx", ".h5", ".msgpack")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_CONFIGS = ("config.json", "model_index.json")
_PLAIN = re.compile(r"^(pytorch_|diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors$")
_VARIANT = re.compile(r"^(?:pytorch_|diffusion_pytorch_)?model\.(?P<variant>[A-Za-z0-9_]+)(-\d+-of-\d+)?\.safetensors$")


def variant_of(folder: str | Path) -> str | None:
    """The only variant (``fp16`` of ``model.fp16.safetensors``) a folder's weights come in; None where there are plain
    ones, or none at all.

    Raises:
        ModelError: several variants and no plain weights.
    """
    names = [path.name for path in Path(folder).glob("*.safetensors")]
    if any(_PLAIN.match(name) for name in names):
        return None
    found = sorted({match["variant"] for name in names if (match := _VARIANT.match(name))})
    if len(found) > 1:
        raise ModelError(
            f"expected one set of weights in {folder}, got variants {found} and no plain one: keep one of them, or "
            "load it with from_pretrained(..., variant=...) and save it again."
        )
    return found[0] if found else None


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter in the place of a whole model."""
    return (Path(folder) / "adapter_config.json").is_file()


def no_folder(source: str | Path) -> str:
    """In words, that a source is not on this disk, for a message that goes on with what the Hub said of it.

    Raises:
        ModelError: the source cannot be the id of a repository either: a path that was mistyped.
    """
    if not _HUB_ID.fullmatch(str(source)):
        raise ModelError(
            f"expected the folder of a model, or an id on the Hub (NAME or OWNER/NAME), got {str(source)!r}: there is "
            "no such folder. Check the path."
        )
    return "no such folder here, and from the Hub "


def refuse_folder(source: str | Path) -> None:
    """Raise ModelError for a file, an adapter or a quantized model where the folder of a whole model is expected.

    Anything that is not on this disk is left to the loader: it may be a Hub id.
    """
    path = Path(source)
    if path.is_file() or (path.suffix in _SINGLE_FILES and not path.exists()):
        raise _single_file(path)
    if not path.is_dir():
        return
    if is_adapter(path):
        raise _adapter(path)
    if not any((path / name).is_file() for name in _CONFIGS):
        files = sorted(file for file in path.iterdir() if file.suffix in _SINGLE_FILES)
        if files:
            raise _single_file(files[0])
    _refuse_pickles(path)
    _refuse_quantized(path)
    _refuse_elsewhere(path)


def _refuse_elsewhere(path: Path) -> None:
    """Raise ModelError for a configuration that is read elsewhere, or names code on the Hub as its attention."""
    config = _config_of(path)
    kernels = [config.get(name) for name in ("attn_implementation", "_attn_implementation")]
    found = [f"configuration_files {config['configuration_files']!r}"] if config.get("configuration_files") else []
    found += [f"the kernel {name!r} of the Hub" for name in kernels if isinstance(name, str) and "/" in name]
    if found:
        raise ModelError(f"expected a config.json that says everything itself, got {found[0]} in {path}: loading it "
                         "would read or run something else than what is examined. Remove the entry.")


def _single_file(path: Path) -> ModelError:
    if not path.is_file():
        return ModelError(f"expected a folder saved with save_pretrained, got {path.name!r}, which is not there.")
    return ModelError(
        f"expected a folder with config.json or model_index.json, got the single file {path.name!r}: convert it once. "
        "A pipeline: diffusers.StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER). A classifier: "
        "build it from its config, load_state_dict(safetensors.torch.load_file(FILE)), save_pretrained(FOLDER). Then "
        "name the folder."
    )


def _adapter(path: Path) -> ModelError:
    try:
        base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    return ModelError(
        f"expected a whole model in {path}, got a PEFT adapter of {base or 'a base it does not name'}: merge it first, "
        "PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(FOLDER), save the image processor "
        "beside it, and name that folder."
    )


def _refuse_pickles(path: Path) -> None:
    """A folder whose only weights are pickles: they can run code when they are read, and are not."""
    files = sorted(file.name for file in path.iterdir() if file.is_file())
    pickles = [name for name in files if name.endswith(_PICKLES) and name != "training_args.bin"]
    if pickles and not any(path.rglob("*.safetensors")):
        raise ModelError(
            f"expected an image model with weights in safetensors in {path}, got {pickles[0]}, a pickle, which can run "
            "code when it is read: convert it where you trust it, with from_pretrained(...).save_pretrained(FOLDER)."
        )


def _config_of(path: Path) -> dict[str, Any]:
    """The entries of config.json; none of one that cannot be read, of which a loader says what is wrong."""
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _refuse_quantized(path: Path) -> None:
    if found := _config_of(path).get("quantization_config"):
        kind = found.get("quant_method", "some method") if isinstance(found, dict) else "some method"
        raise ModelError(
            f"expected float weights in {path}, got weights quantized by {kind}: they cannot be trained or compared "
            "with a base in float32. Name the model they were quantized from."
        )
