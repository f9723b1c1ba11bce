"""Checkpoints that hold everything a resumed run needs, and are loaded strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_immunize.errors import TrainingDivergedError
from hf_immunize.models import DIVERGED, refuse_non_finite
from hf_immunize.training.core.state import CheckpointState
from hf_immunize.training.core.watch import Watch
from hf_immunize.training.vision.publishing import GatedTrainer


class StrictTrainer(GatedTrainer):
    """A ``Trainer`` that replaces how checkpoints are saved and loaded.

    ``watch`` and ``checkpoint_state`` are set by the subclass before training starts.
    """

    watch: Watch
    checkpoint_state: CheckpointState

    @property
    def bare(self) -> Any:
        """The model as it was passed in, without what devices wrap it in."""
        return self.accelerator.unwrap_model(self.model)

    def _refuse_ruined(self) -> None:
        """Raise TrainingDivergedError before weights that are no numbers reach the disk."""
        self.watch.settle()
        refuse_non_finite(self.bare, "the trained model", error=TrainingDivergedError, remedy=DIVERGED)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._refuse_ruined()
        super()._save(output_dir, state_dict)
        # A pickle has no place in a folder that is meant to be published; immunization.json holds the options.
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Our state goes first: the Trainer's own state file is its last, and marks a complete checkpoint.
        self._refuse_ruined()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            self.checkpoint_state.save(folder)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.checkpoint_state.load(Path(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_strictly(resume_from_checkpoint, model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None or not self._load_strictly(best, None):
            super()._load_best_model()

    def _load_strictly(self, folder: str, model: nn.Module | None) -> bool:
        """Load through from_pretrained, which knows renamed keys, and demand every tensor.

        The stock Trainer loads with strict=False, and leaves tensors that were saved under older names as they are.
        """
        bare = self.accelerator.unwrap_model(model if model is not None else self.model)
        if not isinstance(bare, PreTrainedModel) or self.is_fsdp_enabled or hasattr(bare, "peft_config"):
            return False
        loaded = type(bare).from_pretrained(folder, config=bare.config, dtype=bare.dtype, use_safetensors=True)
        bare.load_state_dict(loaded.state_dict(), strict=True)
        return True
