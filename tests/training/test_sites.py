"""Several sites against plain autograd, the LoRA preset against the attacker's own choice, and per-site logging."""

from __future__ import annotations

import pytest
import torch
from test_gradients import relative_error
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification

from hf_immunize.attacks.vision._peft import target_modules
from hf_immunize.data import StepBatchSampler
from hf_immunize.errors import ConfigError, ModelError
from hf_immunize.features import capture_inputs, linear_sites
from hf_immunize.regularizers import closed_form_adversary
from hf_immunize.training.vision.sites import choose_sites

SITES = ["vit.layers.0.attention.q_proj", "vit.layers.1.attention.q_proj"]


def test_what_lora_would_train_is_what_the_attack_trains(make_vit):
    resnet = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3)
    )
    vit = make_vit()
    assert linear_sites(vit, "lora") == target_modules(vit, "classifier", None)
    with pytest.raises(ModelError, match="linear layers besides the head"):
        linear_sites(resnet, "lora")


def test_layers_with_the_same_input_are_one_site(make_vit):
    sample = torch.randn(3, 8, 8)
    assert choose_sites(make_vit(), "lora", None, "classifier", sample) == dict.fromkeys(SITES, 0.5)
    assert choose_sites(make_vit(), "lora", "layers.0.attention.q_proj=2", "classifier", sample) == {
        SITES[0]: 2.0, SITES[1]: 0.5,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="expected site_weights like"):
        choose_sites(make_vit(), "lora", "classifier=1", "classifier", sample)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradient_is_that_of_the_weighted_sum_over_sites(
    make_trainer, make_vit, make_pixels, keep_gradients, accumulation, checkpointing
):
    primary, harmful = make_pixels(24, dtype=torch.float64), make_pixels(30, seed=1, dtype=torch.float64)
    make_trainer(
        model=make_vit(dtype=torch.float64), primary=primary, harmful=harmful, callbacks=[keep_gradients],
        objective="closed_form_adversary", horizon="30,1000", weight="1", strength=1.0, sites="lora",
        site_weights="layers.0.attention.q_proj=2", gradient_accumulation_steps=accumulation, max_steps=1,
        per_device_train_batch_size=24 // accumulation, max_grad_norm=0.0, data_seed=5,
        gradient_checkpointing=checkpointing,
    ).train()  # fmt: skip
    sampler = StepBatchSampler(harmful.labels.tolist(), 12 * accumulation, seed=5)
    rows = sampler.global_batch(0)
    model = make_vit(dtype=torch.float64)
    loss = functional.cross_entropy(model(primary.pixel_values).logits, primary.labels)
    with capture_inputs(model, SITES) as caught:
        model(harmful.pixel_values[rows])
    for site, weight in zip(SITES, (2.0, 0.5), strict=True):
        for horizon in (30.0, 1000.0):
            value = closed_form_adversary(caught[site], harmful.labels[rows], horizon=horizon, memorization=0.5)
            loss = loss + weight * value / 2
    loss.backward()
    truth = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_error(keep_gradients.steps[0], truth) < 1e-9


def test_balanced_weights_push_each_site_with_its_share_of_its_own_reference(make_trainer):
    trainer = make_trainer(sites=r"vit\.layers\.1\.(attention\.q_proj|mlp\.fc1)|classifier", objective="ill_only")
    trainer.train()
    assert len(trainer.objective.weights) == 3
    references = [float(weights.reference) for weights in trainer.objective.weights.values()]
    assert all(reference > 0 for reference in references) and len(set(references)) == 3
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for site in trainer.objective.sites:
        assert {f"harmful_r_ill/{site}", f"lambda/harmful_r_ill/{site}", f"harmful_log_kappa/{site}"} <= set(entry)
    mean = sum(entry[f"harmful_r_ill/{site}"] for site in trainer.objective.sites) / 3
    assert entry["harmful_r_ill"] == pytest.approx(mean)


def test_the_reference_is_the_gradient_of_a_shift_of_all_tokens(make_trainer, make_vit, make_pixels):
    primary = make_pixels(24, dtype=torch.float64)
    trainer = make_trainer(
        model=make_vit(dtype=torch.float64), primary=primary, sites="vit.layers.1.mlp.fc1",
        per_device_train_batch_size=24,
    )  # fmt: skip
    trainer._measure_references()
    model = make_vit(dtype=torch.float64).eval()
    shift = torch.zeros(24, 1, 16, dtype=torch.float64, requires_grad=True)
    model.vit.layers[1].mlp.fc1.register_forward_pre_hook(lambda _, args: (args[0] + shift,))
    functional.cross_entropy(model(primary.pixel_values).logits, (primary.labels + 1) % 3).backward()
    (weights,) = trainer.objective.weights.values()
    assert float(weights.reference) == pytest.approx(float(shift.grad.norm()), rel=1e-9)


def test_a_site_before_everything_that_trains_is_refused(make_trainer):
    with pytest.raises(ConfigError, match="inputs depend on what is trained"):
        make_trainer(trainable_modules="last:1", sites="vit.layers.0.mlp.fc1").train()
    with pytest.raises(ModelError, match="a pattern that fits modules"):
        make_trainer(sites="nowhere")
