"""What is given in memory, as the folders that stages read: models by save_pretrained, data sets by save_to_disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from hf_immunize.data import TaskArguments, has_transform
from hf_immunize.errors import ConfigError, DataError, ModelError
from hf_immunize.stages.fetch import FetchOptions, fetch_model

_PROCESSOR = "preprocessor_config.json"
_RECORD = "immunization.json"
_OURS = ".written-by-hf-immunize"
"""Marks a data set that a call wrote, and may write again."""


def place_model(model: Any, folder: Path, processor: Any = None) -> Path:
    """A model in a folder of its own: that of a folder or Hub id copied, a loaded one saved.

    Args:
        model: folder, Hub id, image model of transformers, or diffusers pipeline.
        folder: where to.
        processor: image processor of a loaded classifier.

    Raises:
        ModelError: something else, or a loaded classifier without its processor.
        RunMismatchError: the folder holds another model.
    """
    if isinstance(model, str | Path):
        fetch_model(FetchOptions(str(model), str(folder)))
        if (Path(model) / _RECORD).is_file() and Path(model).resolve() != folder.resolve():
            shutil.copyfile(Path(model) / _RECORD, folder / _RECORD)
        return folder
    if not callable(getattr(model, "save_pretrained", None)):
        raise ModelError(
            f"expected a folder, a Hub id, a model of transformers or a pipeline of diffusers, got "
            f"{type(model).__name__}: save it with save_pretrained, and give the folder."
        )
    saved = folder.with_name(f"{folder.name}.saved")
    shutil.rmtree(saved, ignore_errors=True)
    model.save_pretrained(str(saved))
    if processor is not None:
        processor.save_pretrained(str(saved))
    elif not (saved / "model_index.json").is_file() and not (saved / _PROCESSOR).is_file():
        shutil.rmtree(saved)
        raise ModelError(
            f"expected processing_class with a loaded {type(model).__name__}, got none: give the image processor it "
            "was "
            "trained with, e.g. AutoImageProcessor.from_pretrained(..., backend='pil')."
        )
    fetch_model(FetchOptions(str(saved), str(folder)))
    shutil.rmtree(saved)
    return folder


def place_data(source: Any, folder: Path) -> str:
    """The name of a source as stages take it: folders, tables and ids as they are, data sets in memory written out.

    Raises:
        DataError: something else, or a stream.
    """
    from datasets import Dataset, DatasetDict

    if isinstance(source, str | Path):
        return str(source)
    if not isinstance(source, Dataset | DatasetDict):
        raise DataError(
            f"expected a folder, a table, a Hub id or a datasets.Dataset with images and labels, got "
            f"{type(source).__name__}: make one, e.g. with datasets.Dataset.from_dict."
        )
    if _transformed(source):
        raise DataError(
            "expected a dataset of images and labels, got one with a transform (with_transform, set_transform), which "
            "cannot be written to a folder: give it without, images are preprocessed here; labels that it makes belong "
            "in a column (map)."
        )
    if folder.exists() and not (folder / _OURS).is_file():
        raise DataError(
            f"expected to write a dataset to {folder}, got a folder that is there and not from an earlier "
            "call: choose another output_dir, or move it away."
        )
    made = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(made, ignore_errors=True)
    source.save_to_disk(str(made))
    (made / _OURS).touch()
    shutil.rmtree(folder, ignore_errors=True)  # after the last row was read: the dataset may come from there
    made.rename(folder)
    return str(folder)


def _transformed(source: Any) -> bool:
    parts = source.values() if isinstance(source, dict) else (source,)
    return any(has_transform(part) for part in parts)


def make_task(model: Path, folder: Path, sources: dict[str, Any], task: dict[str, Any] | None) -> Any:
    """The options of the task for a model: classes for a classifier, photos or classes for a pipeline.

    Args:
        model: its folder.
        folder: where data sets in memory are written.
        sources: ``primary``, ``harmful`` and ``benign``; None where there is none.
        task: further options, by the names that the stages have for them.

    Raises:
        ConfigError: options that the task does not have.
    """
    placed = {name: place_data(source, folder / name) for name, source in sources.items() if source is not None}
    if not (model / "model_index.json").is_file():
        return _made(TaskArguments, {f"{name}_dataset": value for name, value in placed.items()}, task)
    if (model / "vae").is_dir():
        from hf_immunize.diffusion.prompts import PromptArguments
        from hf_immunize.stages.workflow.draft_pipeline import sizes_of

        names = {"primary": "retain_images", "harmful": "harmful_images", "benign": "benign_images"}
        known = {names[name]: value for name, value in placed.items()}
        return _made(PromptArguments, known | {"resolution": sizes_of(model)[1]}, task)
    from hf_immunize.diffusion.tasks import ConceptArguments

    if len(set(placed.values())) > 1:
        raise ConfigError(
            "expected one source as primary and harmful for a pipeline that is told class numbers, got several: give "
            "its "
            "classes in task, e.g. task={'retain_labels': '0,1', 'harmful_labels': '2'}."
        )
    return _made(ConceptArguments, {"dataset": placed["primary"]}, task)


def _made(kind: type, known: dict[str, Any], task: dict[str, Any] | None) -> Any:
    from hf_immunize.options import make_options

    return make_options((kind,), known | (task or {}), "task")[0]
