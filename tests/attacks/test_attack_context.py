import dataclasses

import pytest
import torch

from hf_immunize.attacks import AttackContext, load_classifier, load_processor
from hf_immunize.attacks.vision.context import describe_model
from hf_immunize.errors import ConfigError, DataError, ModelError


def test_a_seed_trains_on_the_same_share_of_every_class(make_context):
    context = make_context(rows=60, fraction=0.8)
    rows = context.draw_rows(3)
    assert torch.bincount(context.attack.labels[rows]).tolist() == [16, 16, 16]
    assert len(set(rows.tolist())) == 48


def test_draws_depend_on_the_seed_and_on_nothing_else(make_context):
    subject, control = make_context("subject", seed=1), make_context("control", seed=0)
    assert torch.equal(subject.draw_rows(5), control.draw_rows(5))
    assert not torch.equal(subject.draw_rows(5), subject.draw_rows(6))
    torch.rand(7)
    one, two = subject.model_with_new_head(5), control.model_with_new_head(5)
    assert torch.equal(one.classifier.weight, two.classifier.weight)
    assert not torch.equal(one.classifier.weight, subject.model_with_new_head(6).classifier.weight)


def test_the_new_head_fits_the_harmful_classes_and_leaves_the_body_alone(make_context):
    context = make_context(labels=4)
    model, saved = context.model_with_new_head(0), load_classifier(context.folder)
    assert model.classifier.out_features == model.config.num_labels == 3
    body = saved.vit.state_dict()
    changed = [name for name, value in body.items() if not torch.equal(value, model.vit.state_dict()[name])]
    assert changed == []


def test_a_head_of_the_same_size_is_replaced_too(make_context):
    context = make_context(labels=3)
    saved = load_classifier(context.folder)
    assert not torch.equal(context.model_with_new_head(0).classifier.weight, saved.classifier.weight)


def test_random_weights_are_drawn_from_the_seed(make_context):
    context = make_context("scratch")
    first, again, other = (context.model(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert context.fingerprint.weights == {}
    assert not torch.equal(context.features(1)["test"], context.features(2)["test"])


def test_features_are_the_input_of_the_head(make_context):
    context = make_context()
    model = load_classifier(context.folder).eval()
    with torch.no_grad():
        logits = model(pixel_values=context.test.pixel_values).logits
    by_hand = torch.nn.functional.linear(context.features(0)["test"], model.classifier.weight, model.classifier.bias)
    assert torch.allclose(logits, by_hand, atol=1e-6)


def test_fingerprint_is_of_the_weights_on_disk(make_context):
    context = make_context()
    model = load_classifier(context.folder)
    assert context.fingerprint == describe_model(context.folder, model)
    assert list(context.fingerprint.weights) == ["model.safetensors"]


def test_the_same_split_twice_is_refused(make_context):
    context = make_context()
    with pytest.raises(DataError, match="expected different attack, validation and test splits"):
        dataclasses.replace(context, data=(context.data[0], context.data[0], context.data[2]))


@pytest.mark.parametrize("changes, message", [
    ({"role": "victim"}, "expected a role out of subject, control, scratch, nothing, alternative, got 'victim'"),
    ({"attack_fraction": 0.0}, r"expected attack_fraction in \(0, 1\], got 0.0"),
])
def test_bad_options(make_context, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(make_context(), **changes)


def test_missing_model_and_processor(tmp_path):
    with pytest.raises(ModelError, match="expected an image classifier saved with save_pretrained in .*check the path"):
        load_classifier(tmp_path / "nothing")
    with pytest.raises(ModelError, match="expected the folder of a model, or an id on the Hub .*Check the path"):
        load_processor(tmp_path / "nothing")


def test_a_head_that_is_not_linear(make_context):
    context = make_context(feature_module="vit.layernorm")
    assert isinstance(context, AttackContext)
    with pytest.raises(ModelError, match="expected a linear head to replace at 'vit.layernorm', got LayerNorm"):
        context.model_with_new_head(0)
