"""Capture against features computed by hand, and loud failures."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTModel,
)

from hf_immunize.data import batches
from hf_immunize.errors import CaptureError, ModelError
from hf_immunize.features import capture_inputs, extract_features, find_classifier, pool_rows


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    common = {"num_labels": 3}
    stages = {"hidden_sizes": [8, 16], "depths": [1, 1]}
    if name == "resnet":
        config = ResNetConfig(embedding_size=8, layer_type="basic", **stages, **common)
        return ResNetForImageClassification(config)
    if name == "convnext":
        return ConvNextForImageClassification(ConvNextConfig(num_stages=2, **stages, **common))
    if name == "mobilenet":
        return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.35, image_size=32, **common))
    return Dinov2ForImageClassification(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, **common)
    )


@pytest.mark.parametrize("name", ["resnet", "convnext", "mobilenet", "dinov2"])
def test_the_head_of_each_family_is_found_and_reproduces_the_logits(name):
    model = small(name).eval()
    site = find_classifier(model)
    pixels = torch.randn(4, 3, 56, 56)
    with torch.no_grad(), capture_inputs(model, [site]) as caught:
        logits = model(pixel_values=pixels).logits
    assert caught[site].shape[0] == 4
    assert torch.allclose(model.get_submodule(site)(caught[site]), logits, atol=1e-5)


def test_extracted_features_equal_those_computed_without_a_hook(make_vit, make_pixels):
    model, data = make_vit(), make_pixels(10)
    model.train()
    ours = extract_features(model, batches(data, batch_size=4), ["classifier"])["classifier"]
    assert model.training
    with torch.no_grad():
        by_hand = model.eval().vit(data.pixel_values).last_hidden_state[:, 0]
    assert torch.allclose(ours, by_hand, atol=1e-6)


def test_captured_features_carry_gradients(make_vit, make_pixels):
    model = make_vit()
    with capture_inputs(model, ["classifier"]) as caught:
        model(pixel_values=make_pixels(4).pixel_values)
    caught["classifier"].sum().backward()
    assert model.vit.embeddings.patch_embeddings.projection.weight.grad is not None


def test_nothing_captured_and_two_captured_both_fail(make_vit, make_pixels):
    model, pixels = make_vit(), make_pixels(4).pixel_values
    with capture_inputs(model, ["classifier"]) as caught:
        pass
    with pytest.raises(CaptureError, match="got none"):
        caught["classifier"]
    with capture_inputs(model, ["classifier"]) as caught:
        model(pixel_values=pixels)
        model(pixel_values=pixels)
    with pytest.raises(CaptureError, match="got two or more"):
        caught["classifier"]


def test_a_forward_repeated_by_checkpointing_after_the_context_is_not_a_second_capture(make_vit, make_pixels):
    model = make_vit()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    with capture_inputs(model, ["classifier"]) as caught:
        model(pixel_values=make_pixels(4).pixel_values)
    caught["classifier"].sum().backward()
    assert caught["classifier"].shape == (4, 16)


def test_hooks_are_removed_even_when_the_forward_fails(make_vit):
    model = make_vit()
    with pytest.raises(RuntimeError), capture_inputs(model, ["classifier"]):
        raise RuntimeError("forward failed")
    assert not model.classifier._forward_pre_hooks


def test_no_linear_head_and_two_heads_say_what_to_name(make_vit):
    backbone = ViTModel(make_vit().config)
    with pytest.raises(ModelError, match="expected one linear classification head .* got none"):
        find_classifier(backbone)
    model = make_vit()
    model.second = nn.Linear(16, 3)
    with pytest.raises(ModelError, match="got 2 .*classifier, second"):
        find_classifier(model)


def test_an_unknown_module_name_is_refused(make_vit):
    with pytest.raises(ModelError, match="its last linear layers are"), capture_inputs(make_vit(), ["head"]):
        pass


def test_an_empty_dataset_gives_no_features(make_vit):
    with pytest.raises(CaptureError, match="dataset is empty"):
        extract_features(make_vit(), [], ["classifier"])


def test_pooling_gives_one_row_per_sample():
    tokens = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(pool_rows(tokens), tokens.mean(1))
    assert torch.equal(pool_rows(tokens[..., None, None].reshape(2, 12, 1, 1)), tokens.reshape(2, 12))
    with pytest.raises(CaptureError, match="N x D"):
        pool_rows(torch.ones(3))
