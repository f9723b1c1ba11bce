"""Which model a defender starts from, and how a finished run is left."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from hf_immunize.errors import ConfigError, NotImmunizedError
from hf_immunize.hub import local_folder
from hf_immunize.models import refuse_folder
from hf_immunize.options import option, required
from hf_immunize.records import HubSource, OutcomeRecord, finish_run, weight_files


@dataclass
class ImmunizeOptions:
    """Which model to immunize."""

    ONLY: ClassVar[dict[str, str]] = {
        "from_scratch": "classifier", "trust_remote_code": "classifier",
        "base_precision": "pipeline",
    }  # fmt: skip

    base_path: str = required("Folder or Hub id of the trained classifier or pipeline to immunize (theta_0); with "
                              "from_scratch, of a config and an image processor.")
    from_scratch: bool = option(False, "Classifiers: immunize while pre-training: start at random weights; only config "
                                "and processor are read.")
    base_revision: str | None = option(None, "Branch, tag or commit of a base on the Hub.")
    trust_remote_code: bool = option(False, "Classifiers: run model code that comes with the model.")
    require: bool = option(False, "Leave with an error unless the last line says IMMUNIZED; model and record are "
                           "written.")
    base_precision: str = option("float32", "Pipelines: precision of the denoiser's weights in memory: float32, or "
                                 "bfloat16 where trainable_modules=lora leaves them as they are.")
    dry_run: bool = option(False, "Print what the run would need in memory, from the config alone, and leave.")

    def __post_init__(self) -> None:
        if self.base_precision not in ("float32", "bfloat16"):
            raise ConfigError(f"expected base_precision float32 or bfloat16, got {self.base_precision!r}.")

    @property
    def denoiser_dtype(self) -> torch.dtype:
        """``base_precision`` as torch calls it."""
        return torch.bfloat16 if self.base_precision == "bfloat16" else torch.float32


def require_outcome(options: ImmunizeOptions, outcome: OutcomeRecord | None) -> None:
    """Raise NotImmunizedError where ``require`` asks for an immunized model and there is none."""
    if options.require and (outcome is None or not outcome.immunized):
        told = outcome.told if outcome else "harmful rows do not allow a look"
        raise NotImmunizedError(f"expected an immunized model, as asked for by require, got {told}")


def fetch_base(options: ImmunizeOptions) -> tuple[Path, HubSource | None]:
    """The folder of the base, and where on the Hub it came from. Raises ModelError for what is no whole model."""
    refuse_folder(options.base_path)
    return local_folder(options.base_path, revision=options.base_revision, with_code=options.trust_remote_code)


def leave_finished(folder: str | Path, stage: str, inputs: Mapping[str, Any], files: Sequence[str]) -> None:
    """Checkpoints gone, and the run marked as whole, with the digests of its weights and of these files."""
    root = Path(folder)
    for checkpoint in root.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    weights = [path.relative_to(root).as_posix() for path in weight_files(root)]
    finish_run(root, stage, dict(inputs), [*weights, *files])
