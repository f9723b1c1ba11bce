"""Dropout right before the head does not hide features from the terms; imitated answers are compared without any."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_classifier

from hf_immunize.training.vision.dropout import dropout_before


def with_dropout(family: str = "mobilenet_v2", rate: float = 0.8) -> torch.nn.Module:
    return tiny_classifier(family, **{
        "mobilenet_v2": {"classifier_dropout_prob": rate}, "efficientnet": {"dropout_rate": rate},
        "vit": {"hidden_dropout_prob": rate},
    }[family])


def image(model):
    return {"pixel_values": torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(("family", "head", "found"), [
    ("mobilenet_v2", "classifier", ["dropout"]), ("efficientnet", "classifier", ["dropout"]), ("vit", "classifier", []),
])
def test_the_layer_before_the_head_is_found(family, head, found):
    model = with_dropout(family).train()
    assert dropout_before(model, [head], image(model)) == found
    assert model.training


@pytest.mark.parametrize("held", [False, True])
def test_terms_read_what_an_attacker_reads(make_trainer, held):
    """With four of five features dropped in training, they would be about noise."""
    options = {"distillation": 10.0, "feature_distillation": 6.0} if held else {}
    trainer = make_trainer(
        model=with_dropout(), objective="ill_only", max_steps=1, learning_rate=0.0, primary_loss_weight=1.0, **options
    )
    seen, layer, reads = [], trainer.model.dropout, []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(module.training))
    trainer.model.classifier.register_forward_pre_hook(lambda _, inputs: reads.append((inputs[0] == 0).double().mean()))
    trainer.train()
    assert seen and not any(seen) and max(reads) < 0.7  # ReLU6 alone


@pytest.mark.parametrize(("distillation", "drops"), [(0.0, True), (1.0, False)])
def test_other_dropout_goes_on_unless_answers_are_imitated(make_trainer, make_vit, distillation, drops):
    trainer = make_trainer(model=make_vit(dropout=0.3), objective="ill_only", max_steps=1, distillation=distillation)
    modes = []
    trainer.model.vit.embeddings.dropout.register_forward_hook(lambda module, *_: modes.append(module.training))
    trainer.train()
    assert any(modes) == drops


def test_evaluation_and_what_is_returned_are_unchanged(make_trainer):
    model = with_dropout()
    trainer = make_trainer(model=model, objective="ill_only", max_steps=1, distillation=1.0)
    trainer.train()
    assert model.dropout.p == 0.8 and model.config.classifier_dropout_prob == 0.8
    assert model.train().dropout.training
