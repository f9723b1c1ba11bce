"""Norms and averages of all weights together, without a copy of all weights."""

from __future__ import annotations

import pytest
import torch
from denoiser_builders import build_denoiser, build_examples, build_scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ViTForImageClassification

from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.training.core import distributed
from hf_immunize.training.core.distributed import average_over_ranks
from hf_immunize.training.diffusion import DiffusionImmunizationConfig, DiffusionImmunizationTrainer


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (), (7, 1, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("bucket,calls", [(2**28, 2), (60, 5)])
def test_averages_take_one_reduction_for_each_bucket_in_the_tensors_own_dtype(monkeypatch, bucket, calls):
    """Two ranks, the other one with three times this one's numbers."""
    seen = []

    def all_reduce(flat):
        seen.append((flat.dtype, flat.numel()))
        flat += 3 * flat

    monkeypatch.setattr(distributed, "_BUCKET", bucket)
    monkeypatch.setattr(distributed, "world", lambda: (0, 2))
    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    some = [*tensors(), *tensors(torch.float64)[:2]]
    truth = [2 * one for one in some]
    average_over_ranks(some)
    assert all(torch.equal(one, other) for one, other in zip(some, truth, strict=True))
    assert len(seen) == calls and sum(count for _, count in seen) == sum(one.numel() for one in some)
    assert {kind for kind, _ in seen} == {torch.float32, torch.float64}


class Largest(TorchDispatchMode):
    """The largest tensor any operation made, by dtype."""

    def __init__(self):
        super().__init__()
        self.seen: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, torch.Tensor):
                self.seen[one.dtype] = max(self.seen.get(one.dtype, 0), one.numel())
        return found


@pytest.mark.parametrize("objective", ["condition_number", "closed_form_adversary", "simulated_attack", "sophon_ice"])
def test_no_tensor_of_a_classifiers_run_has_the_size_of_the_model(tmp_path, make_vit, make_pixels, objective):
    """Guard, teacher, average and checkpoints on. Bytes of one weight at a time are looked at for the digest."""
    torch.manual_seed(0)
    config = make_vit().config
    config.hidden_size, config.intermediate_size = 64, 512
    model = ViTForImageClassification(config)
    args = ImmunizationConfig(
        str(tmp_path), objective=objective, attacker_steps=1, max_steps=2, per_device_train_batch_size=4,
        per_device_harmful_batch_size=6, per_device_eval_batch_size=4, distillation=0.5, feature_distillation=0.5,
        ema_decay=0.9, max_primary_drop=50.0, eval_steps=1, save_steps=1, use_cpu=True, report_to="none",
        disable_tqdm=True,
    )
    trainer = ImmunizationTrainer(model, args, train_dataset=make_pixels(8), harmful_dataset=make_pixels(12, seed=1),
                                  eval_dataset=make_pixels(6, seed=2))  # fmt: skip
    sizes = sorted(parameter.numel() for parameter in model.parameters())
    with Largest() as largest:
        trainer.train()
    assert largest.seen[torch.float32] >= sizes[-1]  # the mode sees what is made
    assert largest.seen[torch.float64] < sizes[-1] / 8 and largest.seen[torch.float32] < sum(sizes) / 2
    assert largest.seen.pop(torch.uint8) == 4 * sizes[-1] and max(largest.seen.values()) < sum(sizes) / 2


@pytest.mark.parametrize("options", [{"attacker_rank": 0}, {"attacker_rank": 2}, {"attacker_second_order": True}])
def test_no_tensor_of_a_run_has_the_size_of_the_model(tmp_path, options):
    """Wide layers, few rows and small images: whatever is as large as all weights together is made of them."""
    model = build_denoiser("dit")
    args = DiffusionImmunizationConfig(
        str(tmp_path), objective="simulated_attack", attacker_steps=1, max_steps=1, per_device_train_batch_size=2,
        per_device_harmful_batch_size=2, use_cpu=True, disable_progress=True, distillation=0.5, ema_decay=0.9,
        max_loss_factor=2.0, eval_steps=1, eval_batch_size=2, save_steps=1, **options,
    )
    trainer = DiffusionImmunizationTrainer(
        model, build_scheduler("dit"), args, train_dataset=build_examples("dit", 4),
        harmful_dataset=build_examples("dit", 4, seed=1, label=9), eval_dataset=build_examples("dit", 2, seed=2),
    )
    sizes = sorted(parameter.numel() for parameter in model.parameters())
    with Largest() as largest:
        trainer.train()
    assert largest.seen[torch.float32] >= sizes[-1]  # the mode sees what is made
    assert largest.seen[torch.float64] < sum(sizes) / 4 and max(largest.seen.values()) < sum(sizes) / 2
