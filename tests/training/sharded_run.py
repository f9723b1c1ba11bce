"""Whole runs of the vision trainer on this process's share: ``sharded_run.py FOLDER PROCESSES``.

Writes what each cell ends with, by how it was spread: ``one`` for one process, ``ddp``, ``fsdp2`` (as ``accelerate
launch`` asks for it), ``asked`` (``fsdp=True``) and ``loaded`` (split by from_pretrained) for several. One process
comes second: it also finishes what several began.
"""

import gc
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from launching import leave
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification
from transformers.distributed import DistributedConfig

from hf_immunize.data import PixelDataset
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.training.core.distributed import world
from hf_immunize.training.core.sharding import is_sharded, whole

torch.set_num_threads(1)
gc.freeze()  # Trainer collects garbage before each run, among all that was imported
folder, processes = Path(sys.argv[1]), int(sys.argv[2])
ASKED = os.environ.get("ACCELERATE_USE_FSDP", "false")
WAYS = ("one",) if processes == 1 else ("ddp", "fsdp2", "asked", "loaded")
GUARD = {"max_primary_drop": 40.0, "eval_strategy": "steps", "eval_steps": 1}
CELLS = {
    "plain": {},
    "sites": {"sites": "lora", "objective": "closed_form_adversary"},
    "guard": GUARD | {"max_steps": 3, "learning_rate": 0.05},
    "distillation": {"distillation": 0.5, "feature_distillation": 0.3},
    "average": {"ema_decay": 0.5},
    "attack": {"objective": "ill_only+simulated_attack", "attacker_steps": 1},
    "caching": {"trainable_modules": "last:1", "cache_frozen_features": True, "distillation": 0.5},
    "everything": GUARD | {"distillation": 0.5, "ema_decay": 0.5, "save_strategy": "steps", "save_steps": 2,
                           "max_steps": 3, "learning_rate": 0.02},
}
results: dict[str, torch.Tensor] = {}
told: dict[str, object] = {}


def pixels(rows: int, seed: int) -> PixelDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.arange(rows) % 3
    return PixelDataset(images + labels[:, None, None, None], labels, ["a", "b", "c"])


def built(way: str) -> ViTForImageClassification:
    """The same weights in every cell."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )
    model = ViTForImageClassification(config).double()
    if way != "loaded":
        return model
    with tempfile.TemporaryDirectory() as place:  # each rank's own copy: save_pretrained writes on the first rank only
        config.dtype = "float64"
        config.save_pretrained(place)
        save_file(model.state_dict(), f"{place}/model.safetensors", metadata={"format": "pt"})
        split = DistributedConfig(fsdp_size=processes)
        return ViTForImageClassification.from_pretrained(place, distributed_config=split)


def trainer_of(way: str, output: Path, cell: str) -> ImmunizationTrainer:
    settings = dict(
        objective="condition_number", max_steps=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        adam_epsilon=1e-4, per_device_train_batch_size=12 // processes, per_device_harmful_batch_size=24 // processes,
        per_device_eval_batch_size=12 // processes, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, logging_steps=1, feature_cache_dir=str(folder / f"cache-{way}"),
        fsdp=way == "asked",
    )
    os.environ["ACCELERATE_USE_FSDP"] = ASKED if way == "fsdp2" else "false"
    trainer = ImmunizationTrainer(
        built(way), ImmunizationConfig(str(output), **settings | CELLS[cell]), train_dataset=pixels(48, 0),
        harmful_dataset=pixels(40, 1), eval_dataset=pixels(30, 2),
    )
    assert trainer.args.world_size == processes, (trainer.args.world_size, processes)
    assert is_sharded(trainer.model) == (way in ("fsdp2", "asked", "loaded"))
    return trainer


def keep(name: str, trainer: ImmunizationTrainer) -> None:
    bare = trainer.accelerator.unwrap_model(trainer.model)
    results.update({f"{name}/{key}": whole(value.detach()).clone() for key, value in bare.state_dict().items()})
    told[name] = {
        "guard": None if trainer.guard_record is None else trainer.guard_record.model_dump(),
        "factor": trainer.step.factor,
        "weights": {site: float(weights.reference) for site, weights in trainer.step.weights.items()},
        "outcome": None if trainer.outcome is None else trainer.outcome.model_dump(exclude={"told"}),
    }


def barrier() -> None:
    if processes > 1:
        torch.distributed.barrier()


for way in WAYS:
    for cell in CELLS:
        if cell == "attack" and way == "loaded":
            continue  # refused: see test_devices.py
        output = folder / f"{way}-{cell}"
        trainer = trainer_of(way, output, cell)
        trainer.train()
        keep(f"{cell}/{way}", trainer)
        if cell == "everything":
            trainer.save_model()
            barrier()
            again = trainer_of(way, output, cell)
            again.train(resume_from_checkpoint=str(output / "checkpoint-2"))
            keep(f"resumed/{way}", again)
if processes == 1:  # on one process, what two with split weights began
    moved = trainer_of("one", folder / "fsdp2-everything", "everything")
    moved.train(resume_from_checkpoint=str(folder / "fsdp2-everything" / "checkpoint-2"))
    keep("resumed/moved", moved)
rank, size = world()
assert size == processes
if rank == 0:
    save_file({name: value.contiguous() for name, value in results.items()}, folder / f"{processes}.safetensors")
    (folder / f"{processes}.json").write_text(json.dumps(told))
leave()
