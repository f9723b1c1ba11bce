"""timm's networks in transformers' TimmWrapper: head and stages are found, the gradient is the formula's."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from test_gradients import relative_error
from tiny_models import SIZE, settled
from torch import nn
from transformers import AutoModelForImageClassification, TimmWrapperConfig

from hf_immunize.data import StepBatchSampler
from hf_immunize.features import find_classifier
from hf_immunize.regularizers import closed_form_adversary

pytest.importorskip("timm", reason="timm, which needs torchvision, is none of this project's packages")

_VIT = {"img_size": SIZE, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
NETWORKS = {
    "vit_tiny_patch16_224": _VIT, "resnet10t": {},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 2, "embed_dim": 8, "depths": (1, 1),
                                     "num_heads": (2, 2)},
}  # fmt: skip
LAST = {"vit_tiny_patch16_224": "timm_model.blocks.1.", "resnet10t": "timm_model.layer4.",
        "convnext_atto": "timm_model.stages.3.", "swin_tiny_patch4_window7_224": "timm_model.layers.1."}  # fmt: skip


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=name, num_labels=3, model_args=NETWORKS[name] | {"drop_path_rate": 0.0})
    return settled(AutoModelForImageClassification.from_config(config))


def size_of(name: str) -> int:
    return 32 if "swin" in name or "resnet" in name or "convnext" in name else SIZE


@pytest.mark.parametrize("name", NETWORKS)
def test_the_gradient_is_the_formulas_and_what_is_saved_reloads(
    make_trainer, make_pixels, keep_gradients, tmp_path, name
):
    primary, harmful = (make_pixels(12, seed=seed, size=size_of(name), dtype=torch.float64) for seed in (0, 1))
    trainer = make_trainer(
        model=tiny(name).double(), primary=primary, harmful=harmful, callbacks=[keep_gradients], weight="1",
        objective="closed_form_adversary", horizon="100", strength=1.0, max_steps=1, per_device_train_batch_size=12,
        max_grad_norm=0.0,
    )
    trainer.train()
    model = tiny(name).double().eval()
    head = find_classifier(model)
    trunk = copy.deepcopy(model)
    trunk.set_submodule(head, nn.Identity())
    drawn = harmful.subset(StepBatchSampler(harmful.labels.tolist(), 12, seed=7).global_batch(0))
    phi, psi = (trunk(pixel_values=rows.pixel_values).logits for rows in (primary, drawn))
    loss = nn.functional.cross_entropy(model.get_submodule(head)(phi), primary.labels)
    (loss + closed_form_adversary(psi, drawn.labels, horizon=100.0)).backward()
    truth = {key: p.grad for key, p in trunk.named_parameters() if p.grad is not None}
    truth |= {f"{head}.{key}": p.grad for key, p in model.get_submodule(head).named_parameters()}
    assert relative_error(keep_gradients.steps[0], truth) < 1e-8
    trainer.model.float()
    trainer.save_model(tmp_path / "saved")
    ours, theirs = trainer.model.state_dict(), AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, ours[key]) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_last_stage_is_what_is_trained(make_trainer, make_pixels, name):
    rows = {"primary": make_pixels(24, size=size_of(name)), "harmful": make_pixels(24, seed=1, size=size_of(name))}
    trainer = make_trainer(model=tiny(name), trainable_modules="last:1", max_steps=1, **rows)
    trainer.train()
    trained = [key for key, p in trainer.model.named_parameters() if p.requires_grad]
    last, head = LAST[name], find_classifier(trainer.model)
    before = re.sub(r"\d(?=\.$)", lambda found: str(int(found[0]) - 1), last)
    assert any(key.startswith(last) for key in trained) and f"{head}.weight" in trained
    assert before != last and not any(key.startswith(before) for key in trained)


@pytest.mark.parametrize("name", [name for name in NETWORKS if "patch" in name])
def test_what_lora_would_train_gives_one_row_per_image(make_trainer, make_pixels, name):
    """A window of Swin is no row; set-up tries it on real rows, and every forward counts."""
    rows = {"primary": make_pixels(24, size=size_of(name)), "harmful": make_pixels(24, seed=1, size=size_of(name))}
    trainer = make_trainer(model=tiny(name), sites="lora", max_steps=1, **rows)
    trainer.train()
    assert len(trainer.site_weights) >= 8  # qkv is one layer, so that all linear ones are taken
