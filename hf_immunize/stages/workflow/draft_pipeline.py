"""The run file of a diffusion pipeline: photos with prompts, or classes for one that is told numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_immunize.errors import ConfigError, ModelError
from hf_immunize.stages.workflow.draft import Draft

_DENOISERS = ("unet", "transformer")
_PHOTO = "a photo"


def is_pipeline(source: str) -> bool:
    """Whether a folder or a repository on the Hub holds a diffusers pipeline."""
    if Path(source).exists():
        return Path(source, "model_index.json").is_file()
    from huggingface_hub import file_exists
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        return file_exists(source, "model_index.json")
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError):
        return False  # whoever loads it says what is wrong with it


def draft_pipeline(draft: Draft, source: str, task: dict[str, Any], protocol: str, revision: str | None) -> list[str]:
    """Write everything below the head of the file; return what was seen, in words.

    Args:
        task: sources by ``primary_dataset``, ``harmful_dataset`` and ``benign_dataset``, with ``*_labels`` or
            ``*_prompt``.

    Raises:
        ModelError: no pipeline with a denoiser.
        ConfigError: sources that a pipeline of this kind cannot take.
    """
    folder = _folder(source, revision)
    config, size = sizes_of(folder)
    prompts = (folder / "vae").is_dir()
    if prompts:
        _prompts(draft, task, size)
    else:
        _concepts(draft, task, size, int(config.get("in_channels", 3)))
    draft.section_value("base", source, "The trained pipeline.")
    if revision:
        draft.option("base_revision", revision, indent=0)
    _immunize(draft, prompts)
    draft.section("attack", "The exam, the same for the base and for the immunized pipeline.")
    draft.option("protocol", protocol, "diffusion_quick: 3 attacks; diffusion_standard: 10")
    draft.option("device", "auto", "cpu, cuda or mps")
    draft.option("eval_batch_size", 8 if prompts else 256, "rows at a time")
    if task.get("benign_dataset") or task.get("benign_labels"):
        draft.section("benign", "Whether a harmless concept is still learned as easily as from the base.")
        draft.option("device", "auto")
    draft.section("certify", "The judge: certificate.json and a model card.")
    draft.option("device", "auto")
    draft.option("judged_images", 200 if prompts else 1000)
    draft.offer("features_path", "facebook/dinov2-small", "an image model that compares drawn with real images")
    return [f"pipeline: {config.get('_class_name', 'denoiser')}, images of {size}x{size}, made from "
            f"{'prompts' if prompts else 'class numbers'}"]


def _folder(source: str, revision: str | None) -> Path:
    """The folder of the pipeline; of one on the Hub the configurations alone."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=revision, allow_patterns=["*.json"]))


def sizes_of(folder: Path) -> tuple[dict[str, Any], int]:
    """The denoiser's config, and the side of the images that it draws."""
    found = [folder / name / "config.json" for name in _DENOISERS if (folder / name / "config.json").is_file()]
    if not found:
        raise ModelError(f"expected a pipeline with a unet or a transformer in {folder.name}, got none: check the "
                         "path.")
    config = json.loads(found[0].read_text(encoding="utf-8"))
    factor = 1
    if (folder / "vae" / "config.json").is_file():
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        factor = 2 ** (len(vae.get("block_out_channels", [0])) - 1)
    return config, int(config.get("sample_size") or 64) * factor


def _prompts(draft: Draft, task: dict[str, Any], size: int) -> None:
    """Folders of photos with their prompts."""
    draft.section("task", "Folders of photos: of what the pipeline draws and keeps, and of the concept it shall not "
                          "learn.")
    names = {"primary": "retain", "harmful": "harmful", "benign": "benign"}
    for side, name in names.items():
        named = task.get(f"{side}_dataset")
        if named is None:
            continue
        if not Path(named).is_dir():
            raise ConfigError(f"expected a folder of photos as {side} for a pipeline that reads prompts, got "
                              f"{named!r}.")
        draft.option(f"{name}_images", named)
        prompt = task.get(f"{side}_prompt")
        captions = f"the prompt of the photos in {Path(named).name}; captions beside them go before it"
        draft.option(f"{name}_prompt", prompt or _PHOTO, check="" if prompt else captions)
    draft.option("resolution", max(16, size // 16 * 16), "side of the images in pixels")


def _concepts(draft: Draft, task: dict[str, Any], size: int, channels: int) -> None:
    """Classes of one source."""
    labelled = task.get("primary_labels") and task.get("harmful_labels")
    if task["harmful_dataset"] != task["primary_dataset"] or not labelled:
        raise ConfigError(
            "expected one source with --primary_labels and --harmful_labels for a pipeline that is told class numbers, "
            f"got {task['primary_dataset']!r} and {task['harmful_dataset']!r}: its classes are those of one dataset."
        )
    draft.section("task", "Classes of one source: what the pipeline draws and keeps, and the concept it shall not "
                          "learn.")
    draft.option("dataset", task["primary_dataset"])
    draft.option("retain_labels", task["primary_labels"])
    draft.option("harmful_labels", task["harmful_labels"])
    if task.get("benign_labels"):
        draft.option("benign_labels", task["benign_labels"])
    draft.option("image_size", size)
    draft.option("channels", channels)


def _immunize(draft: Draft, prompts: bool) -> None:
    draft.section("immunize", "One entry for each immunized pipeline.")
    draft.section("simulated_attack", indent=1)
    for name, (value, about) in immunizing_options(prompts).items():
        draft.option(name, value, about, indent=2)


def immunizing_options(prompts: bool) -> dict[str, tuple[Any, str]]:
    """Value and meaning of the options to immunize with, for large pipelines with prompts and small ones without."""
    options: dict[str, tuple[Any, str]] = {
        "objective": ("simulated_attack", "an attacker of a few steps, simulated in every step"),
        "strength": (0.3 if prompts else 1.0, "where the guard starts; it follows max_primary_drop"),
        "attacker_steps": (4, ""), "attacker_learning_rate": (1e-4 if prompts else 1e-3, ""),
        "max_primary_drop": (5.0 if prompts else 10.0, "percent by which the loss on kept images may rise"),
        "max_steps": (500 if prompts else 300, ""),
        "per_device_train_batch_size": (2 if prompts else 32, ""),
        "per_device_harmful_batch_size": (2 if prompts else 16, ""),
        "learning_rate": (1e-5 if prompts else 1e-3, ""), "eval_steps": (50 if prompts else 25, ""),
    }  # fmt: skip
    if prompts:
        options |= {"gradient_accumulation_steps": (4, ""), "gradient_checkpointing": (True, "less memory, more time")}
    return options
