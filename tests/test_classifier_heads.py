"""Which layer is the head: inside a base in the manner of timm, one of two, or none with the candidates listed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    LevitConfig,
    LevitForImageClassification,
    LevitForImageClassificationWithTeacher,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_immunize.errors import ModelError
from hf_immunize.features import find_classifier

TINY = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "num_labels": 3}


class Trunk(nn.Module):
    """As timm lays a network out: the head is a part of it, told by get_classifier."""

    def __init__(self, width: int, labels: int, head: nn.Module, tells: bool):
        super().__init__()
        self.blocks, self.head = nn.Sequential(nn.Linear(width, width), nn.Linear(width, labels)), head
        if tells:
            self.get_classifier = lambda: self.head.fc if hasattr(self.head, "fc") else self.head


class Wrapped(PreTrainedModel):
    """As transformers wraps timm: everything lies in the base model."""

    config_class = PreTrainedConfig
    base_model_prefix = "timm_model"

    def __init__(self, trunk: nn.Module, labels: int):
        super().__init__(PreTrainedConfig(num_labels=labels))
        self.timm_model = trunk


def nested(width, labels):
    head = nn.Module()
    head.fc = nn.Linear(width, labels)
    return head


def test_the_head_of_a_timm_model_is_what_it_calls_its_classifier():
    assert find_classifier(Wrapped(Trunk(6, 3, nested(6, 3), True), 3)) == "timm_model.head.fc"
    assert find_classifier(Wrapped(Trunk(6, 3, nn.Linear(6, 3), True), 3)) == "timm_model.head"


def test_without_that_the_only_layer_with_an_output_per_label_is_the_head():
    trunk = Trunk(6, 5, nested(6, 3), False)
    assert find_classifier(Wrapped(trunk, 3)) == "timm_model.head.fc"


def test_candidates_are_real_layers():
    with pytest.raises(ModelError, match=r"got 2 \(timm_model.blocks.1, timm_model.head.fc\).*candidates are \["):
        find_classifier(Wrapped(Trunk(6, 3, nested(6, 3), False), 3))
    convolution = nn.Module()
    convolution.fc = nn.Conv2d(6, 3, 1)
    with pytest.raises(ModelError, match=r"got none: .*candidates are \['timm_model.head.fc'\]"):
        find_classifier(Wrapped(Trunk(6, 5, convolution, True), 3))


def test_what_the_message_says_of_two_heads_works(tmp_path):
    two = DeiTForImageClassificationWithTeacher(DeiTConfig(**TINY)).eval()
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(ModelError, match=r"DeiTForImageClassification.from_pretrained.*two.cls_classifier.state_dict"):
        find_classifier(two)
    model = DeiTForImageClassification.from_pretrained(tmp_path / "two").eval()
    model.classifier.load_state_dict(two.cls_classifier.state_dict())
    pixels = torch.randn(2, 3, 8, 8)
    wanted = two(pixel_values=pixels).cls_logits
    assert find_classifier(model) == "classifier"
    assert torch.allclose(model(pixel_values=pixels, labels=torch.tensor([0, 1])).logits, wanted, atol=1e-6)


def test_two_heads_of_which_one_has_the_plain_name(tmp_path):
    config = LevitConfig(
        image_size=32, hidden_sizes=[16, 24, 32], num_attention_heads=[1, 2, 3], depths=[1, 1, 1], key_dim=[8, 8, 8],
        num_labels=3,
    )
    two = LevitForImageClassificationWithTeacher(config).eval()
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(ModelError, match=r"model = LevitForImageClassification.from_pretrained\(FOLDER\); model.save"):
        find_classifier(two)
    model = LevitForImageClassification.from_pretrained(tmp_path / "two").eval()
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model(pixel_values=pixels).logits, two(pixel_values=pixels).cls_logits, atol=1e-6)
    assert find_classifier(model) == "classifier.linear"
