"""A tiny run in a process of its own: ``python killed_diffusion.py FOLDER PLACE`` kills itself.

PLACE is a step, ``write-N`` for the N-th file of the second checkpoint, when all of its bytes are written and it does
not have its name yet, or empty for never.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from denoiser_builders import build_denoiser, build_examples, build_scheduler
from safetensors.torch import save_file

from hf_immunize.training.diffusion import DiffusionImmunizationConfig, DiffusionImmunizationTrainer
from hf_immunize.training.vision.checkpoints import last_complete_checkpoint

torch.set_num_threads(1)
folder, kill_at = Path(sys.argv[1]), sys.argv[2]
FILES = 6
"""Of one checkpoint."""


def kill(trainer):
    if kill_at == str(trainer.step):
        os.kill(os.getpid(), signal.SIGKILL)


class Writes:
    """Stands for os.fsync, which every file of a checkpoint goes through once."""

    seen, real = 0, staticmethod(os.fsync)

    def __call__(self, handle):
        if kill_at == f"write-{self.seen - FILES}":
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1
        self.real(handle)


os.fsync = Writes()


trainer = DiffusionImmunizationTrainer(
    build_denoiser("dit"),
    build_scheduler("dit"),
    DiffusionImmunizationConfig(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=4, per_device_harmful_batch_size=6,
        logging_steps=1, use_cpu=True, disable_progress=True, ema_decay=0.5,
    ),
    train_dataset=build_examples("dit", 8),
    harmful_dataset=build_examples("dit", 8, seed=1, label=9),
    before_update=kill,
)
assert kill_at or last_complete_checkpoint(folder) is None or len(list(folder.glob("checkpoint-2/*.*"))) == FILES
trainer.train(last_complete_checkpoint(folder))
save_file({name: value.clone() for name, value in trainer.bare.state_dict().items()}, folder / "final.safetensors")
