"""Gradients of one step on this process's share: ``global_diffusion_step.py OUTPUT.safetensors PROCESSES``."""

import sys
import tempfile

import torch
from denoiser_builders import build_denoiser, build_examples, build_scheduler
from launching import leave
from safetensors.torch import save_file

from hf_immunize.training.core.distributed import world
from hf_immunize.training.diffusion import DiffusionImmunizationConfig, DiffusionImmunizationTrainer

torch.set_num_threads(1)
processes, gradients = int(sys.argv[2]), {}
CASES = {
    "unet": {
        "opt_kappa, accumulated": {"objective": "opt_kappa", "gradient_accumulation_steps": 2},
        "simulated": {"objective": "simulated_attack", "attacker_steps": 1, "distillation": 0.5,
                      "attacker_renamed": 0.5},
        "another name": {"objective": "simulated_attack", "attacker_steps": 2, "attacker_conditions": "learned"},
        "erasure": {"objective": "esd+meta_unlearning", "weight": "1"},
        "held near": {"objective": "resalign_moreau", "attacker_steps": 1},
        "second order": {"objective": "simulated_attack", "attacker_steps": 2, "attacker_second_order": True},
        "dropout, recomputed": {"objective": "condition_number+simulated_attack", "attacker_steps": 1,
                                "gradient_checkpointing": True},
    },
    "sd": {"distilled": {"objective": "group_kappa", "harmful_group_rows": 6, "distillation": 0.5}},
    "sdxl": {"ill_only": {"objective": "ill_only"}},
    "dit": {
        "condition_number": {"objective": "condition_number"},
        "simulated, accumulated": {"objective": "ill_only+simulated_attack", "attacker_steps": 1,
                                   "gradient_accumulation_steps": 2},
    },
    "pixart": {"attention": {"objective": "opt_kappa", "trainable": "attention"}},
    "flux": {"simulated": {"objective": "simulated_attack", "attacker_steps": 1, "attacker_rank": 2,
                           "attacker_conditions": "random,mixed"}},
    "sd3": {
        "condition_number": {"objective": "condition_number"},
        "lora": {"objective": "ill_only+simulated_attack", "weight": "0.2", "attacker_steps": 1, "attacker_rank": 2},
    },
}


def denoiser(family, case):
    made = build_denoiser(family, dtype=torch.float64)
    for part in made.modules():
        if case.startswith("dropout") and isinstance(part, torch.nn.Dropout):
            part.p = 0.3
    return made


for family, cases in CASES.items():
    for case, options in cases.items():
        trainer = DiffusionImmunizationTrainer(
            denoiser(family, case),
            build_scheduler(family),
            DiffusionImmunizationConfig(
                tempfile.mkdtemp(), max_steps=1, max_grad_norm=0.0, per_device_train_batch_size=8 // processes,
                per_device_harmful_batch_size=12 // processes, use_cpu=True, disable_progress=True, **options,
            ),
            train_dataset=build_examples(family, 16, dtype=torch.float64),
            harmful_dataset=build_examples(family, 12, seed=1, label=9, dtype=torch.float64),
            before_update=lambda made, case=case, family=family: gradients.update(
                {f"{family}/{case}/{n}": p.grad.clone() for n, p in made.bare.named_parameters() if p.grad is not None}
            ),
        )
        assert world()[1] == processes, (world(), processes)
        trainer.train()
if world()[0] == 0:
    save_file({name: value.contiguous() for name, value in gradients.items()}, sys.argv[1])
leave()
