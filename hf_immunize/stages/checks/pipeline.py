"""The images and the pipeline of a diffusion run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_immunize.errors import ImmunizeError
from hf_immunize.stages.checks.findings import Finding
from hf_immunize.stages.checks.options import Parsed
from hf_immunize.stages.checks.rows import WANTED
from hf_immunize.stages.workflow.run_file import RunFile
from hf_immunize.stages.workflow.stages import Stage, base_folder
from hf_immunize.tasks import find_family

_SIDES = ("retain", "harmful", "benign")


def check_pipeline_run(run: RunFile, stages: Mapping[str, Stage], parsed: Parsed, task: Any) -> list[Finding]:
    """What of a pipeline's run can be known without training and without its text encoders."""
    found = _check_photos(task) if find_family(run.task).name == "prompts" else _check_concepts(task)
    if run.base is None:
        return found
    folder = Path(run.base) if Path(run.base).is_dir() else base_folder(run)
    if not folder.is_dir():
        return [*found, Finding("pipeline", "note", f"{run.base} is on the Hub: memory is known once it is fetched")]
    for name in run.models:
        if name in parsed:
            found.append(_memory(folder, name, parsed[name]))
    return found


def _check_photos(task: Any) -> list[Finding]:
    """Folders of photos: how many, whether they can be read, and photos in two folders."""
    from hf_immunize.data import parse_fractions
    from hf_immunize.diffusion.photos import read_photos

    found: list[Finding] = []
    seen: dict[str, set[bytes]] = {}
    for side in _SIDES:
        named = getattr(task, f"{side}_images")
        if named is None:
            continue
        root = Path(named)
        try:
            fractions = parse_fractions(task.retain_splits if side == "retain" else task.concept_splits)
            if not root.is_dir():
                found.append(Finding(f"{side} photos", "fails", f"expected a folder of images, got {named!r}: check "
                                     f"{side}_images."))
                continue
            parts = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
            for folder in parts or [root]:
                photos = read_photos(folder, task.resolution)
                digests = set(photos.digests(side))
                found.append(_counted(side, folder, len(digests), len(fractions)))
                if shared := [other for other, held in seen.items() if held & digests]:
                    found.append(Finding(f"{side} photos", "fails", f"expected each photo in one folder, got some in "
                                         f"{folder.name} and in {shared[0]}: remove them from one of the two."))
                seen[folder.name] = digests
        except ImmunizeError as error:
            found.append(Finding(f"{side} photos", "fails", str(error)))
    return found


def _counted(side: str, folder: Path, images: int, splits: int) -> Finding:
    if images < splits:
        return Finding(f"{side} photos", "fails", f"expected at least {splits} different images in {folder.name}, "
                                                  "one for "
                       f"each split, got {images}: bring more.")
    return Finding(f"{side} photos", "ok", f"{images} different images in {folder.name}")


def _check_concepts(task: Any) -> list[Finding]:
    """The classes of one source, read and split as the stages do it."""
    from hf_immunize.diffusion.tasks import ConceptTask

    try:
        concepts = ConceptTask(task)
        found = []
        for side in concepts.sides:
            splits = WANTED["primary" if side == "retain" else "harmful"]
            counts = [f"{split} {len(concepts.examples(side, split))}" for split in splits]
            found.append(Finding(f"{side} images", "ok", ", ".join(counts)))
    except ImmunizeError as error:
        return [Finding("images", "fails", str(error))]
    return found


def _memory(folder: Path, name: str, held: tuple[Any, ...]) -> Finding:
    """The peak of a training step against what the device has."""
    from hf_immunize.diffusion import hollow_denoiser
    from hf_immunize.stages.checks.model import device_memory
    from hf_immunize.training.diffusion.planning import plan_memory

    try:
        peak = plan_memory(hollow_denoiser(folder, held[1].denoiser_dtype), held[2]).peak
    except ImmunizeError as error:
        return Finding(f"memory {name}", "fails", str(error))
    has, device = device_memory(bool(held[2].use_cpu))
    told = f"{peak / 1e9:.2f} GB of {has / 1e9:.1f} GB on the {device} in a training step"
    if peak > has:
        return Finding(f"memory {name}", "fails", f"expected a step that fits, got {told}: lower the batch sizes, set "
                       "gradient_checkpointing: true or trainable_modules: lora.")
    return Finding(f"memory {name}", "ok", told)
