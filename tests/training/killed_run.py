"""A tiny run in a process of its own: ``python killed_run.py FOLDER STEP`` kills itself at STEP (0: never)."""

import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification
from transformers.trainer_callback import TrainerCallback

from hf_immunize.data import PixelDataset
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.training.vision.checkpoints import last_complete_checkpoint

torch.set_num_threads(1)
folder, kill_at = Path(sys.argv[1]), int(sys.argv[2])


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if kill_at and state.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def pixels(seed: int) -> PixelDataset:
    generator = torch.Generator().manual_seed(seed)
    return PixelDataset(torch.randn(24, 3, 8, 8, generator=generator), torch.arange(24) % 3, ["a", "b", "c"])


torch.manual_seed(0)
model = ViTForImageClassification(
    ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=3, hidden_dropout_prob=0.1,
    )
)
args = ImmunizationConfig(
    str(folder), max_steps=5, save_steps=2, per_device_train_batch_size=8, per_device_harmful_batch_size=12,
    report_to="none", use_cpu=True, disable_tqdm=True,
)
trainer = ImmunizationTrainer(model, args, train_dataset=pixels(0), harmful_dataset=pixels(1), callbacks=[Kill()])
trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
save_file({name: value.clone() for name, value in model.state_dict().items()}, folder / "final.safetensors")
