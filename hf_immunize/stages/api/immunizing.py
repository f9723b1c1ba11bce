"""``immunize``: a model, what it keeps, what it shall not learn; everything else by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from transformers.utils import logging

from hf_immunize.options import make_options
from hf_immunize.records import ImmunizationRecord
from hf_immunize.stages.api.places import make_task, place_model
from hf_immunize.stages.base import ImmunizeOptions
from hf_immunize.tasks import Family, family_of

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Immunized:
    """An immunized model on disk.

    Args:
        folder: of the model, a ``save_pretrained`` folder with ``immunization.json``.
        base: of the model before, with its head for the primary classes.
        task: options of the data, as an exam takes them.
    """

    folder: Path
    base: Path
    task: Any

    @property
    def record(self) -> ImmunizationRecord:
        """What was done to the model, and what it did to terms, probe and primary metric."""
        return ImmunizationRecord.read(self.folder / "immunization.json")

    def __str__(self) -> str:
        outcome = self.record.outcome
        return f"{self.folder}: {outcome.told if outcome is not None else 'immunized'}"


def immunize(
    model: Any, primary: Any, harmful: Any, *, output_dir: str | Path | None = None, processing_class: Any = None,
    task: Mapping[str, Any] | None = None, **options: Any,
) -> Immunized:
    """Immunize a model against a harmful task with the settings that ``hf-immunize init`` writes.

    A classifier without a head for the primary classes is first given one, trained on frozen features.

    Args:
        model: folder (save_pretrained), Hub id, loaded classifier or backbone, or diffusers pipeline.
        primary: images that the model keeps: folder with a sub-folder per class, table, Hub id or ``datasets.Dataset``;
            for a pipeline that reads prompts a folder of photos.
        harmful: images that it shall not learn.
        output_dir: where base and immunized model are kept, and found again by a second call; a new temporary folder by
            default.
        processing_class: image processor of a loaded classifier.
        task: further options of the data, by their names for the stages (``{"primary_labels": "0,1,2"}``).
        options: options of ``ImmunizationConfig`` (``DiffusionImmunizationConfig`` for a pipeline) that replace the
            defaults, e.g. ``max_steps=50``.

    Raises:
        ConfigError: an unknown option.
        ModelError, DataError: something that cannot be read.
        RunMismatchError: ``output_dir`` holds another run.
    """
    from hf_immunize.stages.immunize import config_of, immunize_model
    from hf_immunize.stages.start import hush

    hush()
    root = Path(output_dir or mkdtemp(prefix="hf_immunize-"))
    original = place_model(model, root / "original", processing_class)
    arguments = make_task(original, root / "data", {"primary": primary, "harmful": harmful}, dict(task or {}))
    family = family_of(arguments)
    if family.kind == "classifier" and "harmful_splits" not in (task or {}):
        arguments = _with_probe(arguments)
    base, told = _prepare(original, root / "base", arguments, family, options)
    told |= options | {"output_dir": str(root / "immunized"), "base_path": str(base)}
    prepared = make_options((ImmunizeOptions, config_of(family)), told, "immunize")
    immunize_model(arguments, *prepared)
    return Immunized(root / "immunized", base, arguments)


def _with_probe(arguments: Any) -> Any:
    """The task with a part of the harmful rows held out, by which training says whether it worked."""
    from hf_immunize.stages.checks.rows import read_side, refuse_one_task
    from hf_immunize.stages.workflow.draft_classifier import splits_with_probe

    refuse_one_task(arguments)
    splits = splits_with_probe(read_side(arguments, "harmful"))
    return arguments if splits is None else replace(arguments, harmful_splits=splits)


def _prepare(
    original: Path, base: Path, arguments: Any, family: Family, options: Mapping[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """The folder to start from, with a head for the primary classes, and the settings for a model like this."""
    if family.kind == "pipeline":
        from hf_immunize.stages.workflow.draft_pipeline import immunizing_options as of_pipeline

        return original, {name: value for name, (value, _) in of_pipeline(family.name == "prompts").items()}
    from hf_immunize.stages.checks.rows import read_side
    from hf_immunize.stages.workflow.draft_classifier import head_options, immunizing_options, look_at, unknown_outputs

    kept, harmful = read_side(arguments, "primary"), read_side(arguments, "harmful")
    seen = look_at(str(original), kept.names)
    told = {name: value for name, (value, _) in immunizing_options(seen, harmful).items()}
    if (unknown := unknown_outputs(seen, kept)) is None:
        return original, told
    if unknown:
        logger.warning(f"the model's own head does not fit the primary classes ({unknown}): a new one is trained.")
    from hf_immunize.stages.pretrain import options_of, pretrain_model

    head: dict[str, Any] = {name: value for name, (value, _) in head_options(str(original), seen).items()}
    head |= {name: options[name] for name in ("use_cpu", "report_to", "seed") if name in options}
    pretrain_model(arguments, *make_options(options_of(family), head | {"output_dir": str(base)}, "pretrain"))
    return base, told
