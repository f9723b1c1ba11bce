"""Models that are classifiers all the same: configs that say little, wrappers, and what is no model at all."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PvtConfig, PvtForImageClassification

from hf_immunize.data import id2label_of
from hf_immunize.errors import ConfigError
from hf_immunize.features import find_classifier


@pytest.fixture
def pvt():
    return PvtForImageClassification(PvtConfig(
        image_size=16, num_encoder_blocks=2, depths=[1, 1], sequence_reduction_ratios=[2, 1], hidden_sizes=[8, 16],
        patch_sizes=[4, 2], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], num_labels=3,
    ))  # fmt: skip


def test_a_config_that_says_how_many_outputs_and_no_names(make_trainer, make_pixels, pvt):
    assert pvt.config.id2label is None, "PVT names its outputs by now: this test needs another model"
    assert id2label_of(pvt.config) == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    rows = {"primary": make_pixels(24, size=16), "harmful": make_pixels(30, seed=1, size=16)}
    trainer = make_trainer(pvt, **rows, evaluation=make_pixels(12, seed=2, size=16), max_primary_drop=100.0)
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.guard_record.held


ADAPTERS = {
    "plain": ({}, "base_model.model.classifier"),
    "head saved": ({"modules_to_save": ["classifier"]}, "base_model.model.classifier.modules_to_save.default"),
    "head adapted": ({"target_modules": ["q_proj", "v_proj", "classifier"]}, "base_model.model.classifier.base_layer"),
}


def adapted(model, **options):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 3} | options))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_lora_by_peft_trains_resumes_and_is_saved_as_an_adapter(make_trainer, make_vit, make_pixels, tmp_path, kind):
    options, head = ADAPTERS[kind]
    model = adapted(make_vit(), **options)  # as many columns as there are classes: r is no head
    start = copy.deepcopy(model)
    assert find_classifier(model) == head
    words = {"objective": "condition_number", "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    trainer = make_trainer(model, **words)
    trainer.train()
    again = make_trainer(start, **words)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    ends = [run.model.state_dict() for run in (trainer, again)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    trainer.save_model(str(tmp_path / "adapter"))
    pixels = make_pixels(6, seed=3).pixel_values
    back = PeftModel.from_pretrained(make_vit(), tmp_path / "adapter").eval()
    answers = [one(pixel_values=pixels).logits for one in (back, trainer.model.eval(), make_vit().eval())]
    torch.testing.assert_close(answers[0], answers[1])
    assert not torch.allclose(answers[0], answers[2], atol=1e-3)


def test_the_features_of_an_adapted_model_are_those_of_the_merged_one(make_trainer, make_vit):
    """The terms see what the head reads: with fresh factors, which change nothing, the plain model's."""
    found = {}
    for name, model in (("plain", make_vit()), ("adapted", adapted(make_vit()))):
        trainer = make_trainer(model, objective="condition_number")
        trainer._outcome_meter.start(trainer.bare)
        found[name] = trainer._outcome_meter.before
    assert found["plain"] == found["adapted"]


def test_an_attackers_own_factors_beside_those_of_peft_are_refused(make_trainer, make_vit):
    with pytest.raises(ConfigError, match="expected attacker_rank=0 for simulated_attack of a PeftModel, got 2"):
        make_trainer(adapted(make_vit()), objective="simulated_attack", attacker_rank=2)
