"""Whole runs of the diffusion trainer on this process's share: ``sharded_diffusion.py FOLDER PROCESSES``.

Writes what each cell ends with, by how it was spread: ``one`` for one process, ``ddp`` and ``fsdp2`` (as ``accelerate
launch`` asks for it) for several. One process comes second: it also finishes what several began.
"""

import json
import os
import sys
from pathlib import Path

import torch
from denoiser_builders import build_denoiser, build_examples, build_scheduler
from launching import leave
from safetensors.torch import save_file

from hf_immunize.training.core.distributed import world
from hf_immunize.training.core.sharding import is_sharded, whole
from hf_immunize.training.diffusion import DiffusionImmunizationConfig, DiffusionImmunizationTrainer

torch.set_num_threads(1)
folder, processes = Path(sys.argv[1]), int(sys.argv[2])
ASKED = os.environ.get("ACCELERATE_USE_FSDP", "false")
WAYS = ("one",) if processes == 1 else ("ddp", "fsdp2")
GUARD = {"max_primary_drop": 50.0, "eval_steps": 1}
CELLS = {
    "plain": ("sd3", {"gradient_accumulation_steps": 2}),
    "unet": ("sd", {"objective": "group_kappa", "harmful_group_rows": 6, "sites": "middle"}),
    "guard": ("sd3", GUARD | {"max_steps": 3, "learning_rate": 0.05, "max_primary_drop": 2.0}),
    "distillation": ("sd3", {"distillation": 0.5}),
    "average": ("sd3", {"ema_decay": 0.5}),
    "factors": ("flux", {"trainable_modules": "lora", "lora_rank": 2, "distillation": 0.5}),
    "attack": ("sd3", {"objective": "ill_only+simulated_attack", "attacker_steps": 1}),
    "attack, factors": ("sd3", {"objective": "simulated_attack", "attacker_steps": 1, "attacker_rank": 2}),
    "attack, both": ("flux", {"objective": "simulated_attack", "attacker_steps": 1, "attacker_rank": 2,
                              "trainable_modules": "lora", "lora_rank": 2}),
    "imma": ("sd3", {"objective": "imma", "trainable_modules": "attention", "attacker_rank": 2}),
    "everything": ("sd3", GUARD | {"distillation": 0.5, "ema_decay": 0.5, "max_steps": 3, "save_steps": 2,
                                   "save_total_limit": 2, "objective": "opt_kappa", "learning_rate": 0.01}),
}  # fmt: skip
results: dict[str, torch.Tensor] = {}
told: dict[str, object] = {}


def trainer_of(way: str, output: Path, cell: str) -> DiffusionImmunizationTrainer:
    family, options = CELLS[cell]
    settings = dict(
        objective="condition_number", max_steps=2, per_device_train_batch_size=8 // processes,
        per_device_harmful_batch_size=12 // processes, learning_rate=1e-3, use_cpu=True, disable_progress=True,
        logging_steps=1,
    )
    os.environ["ACCELERATE_USE_FSDP"] = ASKED if way == "fsdp2" else "false"
    made = build_denoiser(family, dtype=torch.float64)
    trainer = DiffusionImmunizationTrainer(
        made, build_scheduler(family), DiffusionImmunizationConfig(str(output), **settings | options),
        train_dataset=build_examples(family, 16, dtype=torch.float64),
        harmful_dataset=build_examples(family, 12, seed=1, label=9, dtype=torch.float64),
        eval_dataset=build_examples(family, 6, seed=5, dtype=torch.float64),
    )
    assert world()[1] == processes, (world(), processes)
    assert is_sharded(trainer.bare) == (way == "fsdp2")
    return trainer


def keep(name: str, trainer: DiffusionImmunizationTrainer) -> None:
    results.update({f"{name}/{key}": whole(v.detach()).clone() for key, v in trainer.bare.state_dict().items()})
    guard = trainer.guard_record.model_dump()
    told[name] = {"log": trainer.log_history, "guard": guard, "factor": trainer.terms.factor}


for way in WAYS:
    for cell in CELLS:
        trainer = trainer_of(way, folder / f"{way}-{cell}", cell)
        trainer.train()
        keep(f"{cell}/{way}", trainer)
        if cell == "everything":
            again = trainer_of(way, folder / f"{way}-{cell}", cell)
            again.train(folder / f"{way}-{cell}" / "checkpoint-2")
            keep(f"resumed/{way}", again)
            if (released := again.whole_model()) is not None and world()[0] == 0:
                released.save_pretrained(folder / f"{way}-released")
if processes == 1:  # on one process, what two with split weights began
    moved = trainer_of("one", folder / "fsdp2-everything", "everything")
    moved.train(folder / "fsdp2-everything" / "checkpoint-2")
    keep("resumed/moved", moved)
if world()[0] == 0:
    save_file({name: value.contiguous() for name, value in results.items()}, folder / f"{processes}.safetensors")
    (folder / f"{processes}.json").write_text(json.dumps(told))
leave()
