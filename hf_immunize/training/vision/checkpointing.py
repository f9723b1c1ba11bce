"""Checkpoints that hold everything a resumed run needs, and are loaded strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel

from hf_immunize.errors import RecordError, TrainingDivergedError
from hf_immunize.models import DIVERGED, refuse_non_finite
from hf_immunize.records import atomic_write
from hf_immunize.training.core.changing import ChangingPart
from hf_immunize.training.core.state import CheckpointState
from hf_immunize.training.core.watch import Watch
from hf_immunize.training.vision.checkpoints import last_complete_checkpoint
from hf_immunize.training.vision.sharded import ShardedTrainer, load_whole

CHANGED = "changed.safetensors"
"""In a checkpoint of a model that is frozen in part: the weights that are not."""


def checkpoint_for(resume: Any, folder: str | Path | None, steps_done: int) -> Any:
    """What ``train`` goes on from: of ``True`` the newest checkpoint of the folder that is whole.

    Args:
        resume: as ``Trainer.train`` takes it.
        folder: of the run.
        steps_done: by this trainer already.

    Raises:
        RecordError: a checkpoint by the name of a folder that is not there, none that is whole, or a trainer whose
            model has been trained, and is θ₀ no more.
    """
    if steps_done:
        raise RecordError(
            f"expected a model that is as it was before immunization, got one that this trainer trained for "
            f"{steps_done} steps: what was lost would be measured against it. Make a new trainer with the base, and "
            "pass resume_from_checkpoint=True to go on."
        )
    if isinstance(resume, str | Path) and not Path(resume).is_dir():
        raise RecordError(
            f"expected the folder of a checkpoint, got {resume}, which is not there: check the path, or pass True for "
            "the newest one of output_dir."
        )
    if resume is not True or folder is None or not any(Path(folder).glob("checkpoint-*")):
        return resume
    newest = last_complete_checkpoint(folder)
    if newest is None:
        raise RecordError(f"expected a whole checkpoint in {folder}, got none: a save was cut short. Start anew.")
    return newest


class StrictTrainer(ShardedTrainer):
    """A ``Trainer`` that replaces how checkpoints are saved and loaded.

    ``watch`` and ``checkpoint_state`` are set by the subclass before training starts.
    """

    watch: Watch
    checkpoint_state: CheckpointState
    _in_checkpoint = False

    @property
    def bare(self) -> Any:
        """The model as it was passed in, without what devices wrap it in."""
        return self.accelerator.unwrap_model(self.model)

    def evaluate_aside(self, metric_key_prefix: str) -> dict[str, float]:
        """An evaluation beside those that were asked for: early stopping does not hear of it, and counts the others."""
        handler = self.callback_handler
        kept = handler.callbacks
        handler.callbacks = [one for one in kept if not isinstance(one, EarlyStoppingCallback)]
        try:
            return self.evaluate(metric_key_prefix=metric_key_prefix)
        finally:
            handler.callbacks = kept

    def _refuse_ruined(self) -> None:
        """Raise TrainingDivergedError before weights that are no numbers reach the disk."""
        self.watch.settle()
        refuse_non_finite(self.bare, "the trained model", error=TrainingDivergedError, remedy=DIVERGED)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._refuse_ruined()
        folder = Path(str(output_dir or self.args.output_dir))
        if self._in_checkpoint and self._part_is_enough():
            self._save_changed(folder)
        else:
            try:
                super()._save(output_dir, state_dict)
            except SafetensorError as error:  # no room, a file size limit, a folder that may not be written
                raise RecordError(
                    f"expected to write the weights to {folder}, got {error}: free room there, or choose another "
                    "output_dir. Checkpoints that are whole are kept, and training goes on from the last one."
                ) from error
        # A pickle has no place in a folder that is meant to be published; immunization.json holds the options.
        (folder / "training_args.bin").unlink(missing_ok=True)

    def _part_is_enough(self) -> bool:
        """Whether most of the model is frozen, and is there again when a run resumes, since θ₀ is passed in again."""
        frozen = any(not parameter.requires_grad for parameter in self.bare.parameters())
        return frozen and not self.is_split and isinstance(self.bare, PreTrainedModel)

    def _save_changed(self, folder: Path) -> None:
        """What training changes, and nothing else: not a model that can be loaded, but what is missing to θ₀."""
        changed = ChangingPart(self.bare).state_dict()
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in changed.items()}
        atomic_write(folder / CHANGED, save(tensors))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Our state goes first: the Trainer's own state file is its last, and marks a complete checkpoint.
        self._refuse_ruined()
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        self.checkpoint_state.save(folder, write=self.args.should_save)
        self._in_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._in_checkpoint = False

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not list(Path(checkpoint).glob("optimizer*")):
            raise RecordError(
                f"expected an optimizer's state in {checkpoint}, got none: a checkpoint of save_only_model cannot be "
                "resumed exactly. Train again, or take its weights as a new start."
            )
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
        if (Path(folder) / CHANGED).is_file():
            self._load_changed(Path(folder) / CHANGED, bare)
            return True
        if not isinstance(bare, PreTrainedModel) or self.is_fsdp_enabled or hasattr(bare, "peft_config"):
            return False
        load_whole(folder, bare)
        return True

    def _load_changed(self, file: Path, bare: nn.Module) -> None:
        try:
            ChangingPart(bare).load_state_dict(load_file(file), strict=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise RecordError(
                f"expected the weights that this run trains in {file}, got {error}: resume with the trainable_modules "
                "the checkpoint was written with."
            ) from error
