"""Models that are classifiers all the same: configs that say little, wrappers, and what is no model at all."""

from __future__ import annotations

import pytest
from transformers import PvtConfig, PvtForImageClassification

from hf_immunize.data import id2label_of


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
