"""One optimizer step per objective and accumulation on this process's share: ``global_step.py OUTPUT.safetensors``."""

import sys
import tempfile

import torch
from launching import leave
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import ViTConfig, ViTForImageClassification
from transformers.distributed import DistributedConfig
from transformers.trainer_callback import TrainerCallback

from hf_immunize.data import PixelDataset
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.training.core.distributed import world
from hf_immunize.training.vision.support import is_sharded

torch.set_num_threads(1)
gradients: dict[str, torch.Tensor] = {}


class Keep(TrainerCallback):
    def __init__(self, name):
        self.name = name

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                whole = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                gradients[f"{self.name}/{key.removeprefix('module.')}"] = whole.clone()


def pixels(rows: int, seed: int) -> PixelDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.arange(rows) % 3
    return PixelDataset(images + labels[:, None, None, None], labels, ["a", "b", "c"])


def built(processes: int, sharded: bool) -> ViTForImageClassification:
    """The same weights in every case, as they are or split over ranks."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )
    model = ViTForImageClassification(config).double()
    if not sharded or processes == 1:
        return model
    with tempfile.TemporaryDirectory() as folder:  # each rank's own copy: save_pretrained writes on the first rank only
        config.dtype = "float64"
        config.save_pretrained(folder)
        save_file(model.state_dict(), f"{folder}/model.safetensors", metadata={"format": "pt"})
        split = DistributedConfig(fsdp_size=processes)
        return ViTForImageClassification.from_pretrained(folder, distributed_config=split)


def step(
    objective: str, accumulation: int, weight: str, processes: int, what: str = "", sharded: bool = False, **options
) -> None:
    settings = dict(
        objective=objective, weight=weight, strength=1.0, max_steps=1, max_grad_norm=0.0, optim="sgd",
        distillation=0.5, harmful_group_rows=9, gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=24 // accumulation // processes, per_device_harmful_batch_size=24 // processes,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )
    args = ImmunizationConfig(tempfile.mkdtemp(), **settings | options)
    model = built(processes, sharded)
    name = f"{objective}{what}/{accumulation}/{weight}"
    trainer = ImmunizationTrainer(
        model, args, train_dataset=pixels(48, 0), harmful_dataset=pixels(40, 1), callbacks=[Keep(name)]
    )
    assert trainer.args.world_size == processes, (trainer.args.world_size, processes)
    assert is_sharded(model) == (sharded and processes > 1)
    trainer.train()


processes = int(sys.argv[2])
OBJECTIVES = ("condition_number", "opt_kappa", "group_kappa", "closed_form_adversary", "ill_only+closed_form_adversary")
for objective in OBJECTIVES:
    for accumulation in (1, 2):
        for weight in ("1", "auto"):
            step(objective, accumulation, weight, processes)
VARIANTS = {
    "+sites": ("closed_form_adversary", {"sites": "lora", "site_weights": "q_proj=0.7", "horizon": "30,1000"}),
    "+bank": ("condition_number", {"feature_bank_rows": 30, "max_steps": 2}),
    "+memory": ("imma", {"max_steps": 2, "attacker_steps": 50}),
    "+lora": ("imma", {"max_steps": 2, "attacker_lora_rank": 2}),
    "+inverse": ("condition_number", {"precondition_gradients": "layers.1.mlp.fc2"}),
    "+changed": ("opt_kappa", {"augmentation": "flip,crop,color,erase"}),
    "+checkpointed": ("closed_form_adversary", {"activation_checkpointing": True, "sites": "lora"}),
}
for what, (objective, options) in VARIANTS.items():
    for accumulation in (1, 2):
        step(objective, accumulation, "auto", processes, what, **options)
SHARDED = {
    "+sharded": ("condition_number", {}),
    "+sharded+adversary": ("closed_form_adversary", {"horizon": "30,1000"}),
    "+sharded+bank": ("opt_kappa", {"feature_bank_rows": 30, "max_steps": 2}),
    "+sharded+memory": ("imma", {"max_steps": 2, "attacker_steps": 50}),
    "+sharded+checkpointed": ("group_kappa", {"activation_checkpointing": True}),
}
for what, (objective, options) in SHARDED.items():
    for accumulation in (1, 2):
        step(objective, accumulation, "auto", processes, what, sharded=True, distillation=0.0, **options)
rank, size = world()
assert size == processes
if rank == 0:
    save_file({name: value.contiguous() for name, value in gradients.items()}, sys.argv[1])
leave()
