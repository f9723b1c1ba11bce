"""Network-training attacks: what they train, on which rows, in which order, and against a hand-written step."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_immunize.attacks import ATTACKS, Run
from hf_immunize.attacks import _finetune as engine
from hf_immunize.attacks.vision._peft import adapt, target_modules
from hf_immunize.attacks.vision.lora import Lora, make_config
from hf_immunize.data import PixelDataset

FullFinetune = ATTACKS["full_finetune"].config


def prepare_lora(context, run):
    return adapt(context, run, make_config)


def only(context, name, config, seed=0):
    attack = ATTACKS[name]
    ((_, result),) = attack.run(context, [Run(config, "x", seed)])
    assert result.outcome != "not_applicable" or attack.refuses or attack.needs, f"{name} refused {result.note}, unsaid"
    return result


def test_one_full_step_equals_a_hand_written_one(make_context):
    """SGD on one batch of every row: the loss scale, the clipping and the head are exactly what is said."""
    context = make_context(rows=30)
    config = FullFinetune(learning_rate=0.1, steps=1, batch_size=64, optimizer="sgd", max_grad_norm=0.0)
    kept = {}
    model = context.model_with_new_head(4)
    engine.finetune(context, model, config, 4)
    kept = model.state_dict()
    by_hand = context.model_with_new_head(4).train()
    rows = context.draw_rows(4)
    batch = context.attack.subset(rows)
    nn.functional.cross_entropy(by_hand(pixel_values=batch.pixel_values).logits, batch.labels).backward()
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            assert torch.allclose(kept[name], parameter - 0.1 * parameter.grad, atol=1e-6), name


@pytest.mark.parametrize("name, config", [("full_finetune", FullFinetune(1e-2, 30)), ("lora", Lora(1e-2, 30))])
def test_attacks_learn_and_repeat_exactly(make_context, name, config):
    context = make_context()
    first, again, other = (only(context, name, config, seed) for seed in (0, 0, 1))
    assert first.outcome == "completed" and first.curve == again.curve != other.curve
    assert [point.step for point in first.curve] == engine.evaluation_steps(30, engine._EVALUATION_RATIO)
    assert max(point.test for point in first.curve) > 0.6


def test_data_order_is_the_seeds_and_not_the_models(make_context, monkeypatch):
    seen, current = {}, []
    plain = PixelDataset.__getitem__

    def recorded(self, index):
        current.append(int(index))
        return plain(self, index)

    monkeypatch.setattr(PixelDataset, "__getitem__", recorded)
    runs = {"subject": ("subject", 1, 0), "control": ("control", 0, 0), "other": ("control", 0, 9)}
    for name, (role, weights, seed) in runs.items():
        current.clear()
        only(make_context(role, seed=weights), "full_finetune", FullFinetune(steps=5, batch_size=8), seed)
        seen[name] = list(current)
    assert seen["subject"] == seen["control"] != seen["other"]
    assert len(seen["subject"]) >= 40  # loaders fetch one batch ahead


def test_a_divergent_rate_is_reported_as_diverged(make_context):
    result = only(make_context(), "full_finetune", FullFinetune(1e25, 20, optimizer="sgd", max_grad_norm=0.0))
    assert result.outcome == "diverged"
    assert "not finite" in result.note
    assert len(result.curve) < len(engine.evaluation_steps(20))


def test_lora_trains_updates_and_head_only(make_context):
    context = make_context()
    model = prepare_lora(context, Run(Lora(rank=2), "x", 0))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name or ".classifier." in name for name in trained)
    assert any(".classifier." in name for name in trained)
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained if "lora_" in name}
    assert adapted <= {"q_proj", "v_proj", "query", "value"} and len(adapted) == 2


def test_lora_initialisation_is_the_seeds(make_context):
    draws = [prepare_lora(context, Run(Lora(), "x", seed)).state_dict()
             for context, seed in ((make_context(), 1), (make_context("subject", seed=1), 1), (make_context(), 2))]
    names = [name for name in draws[0] if "lora_A" in name]
    assert names and all(torch.equal(draws[0][name], draws[1][name]) for name in names)
    assert not any(torch.equal(draws[0][name], draws[2][name]) for name in names)


def test_targets_fall_back_to_linear_layers_then_convolutions():
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert target_modules(plain, "2", None) == ["0"]
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=2, layer_type="basic")
    convolutional = ResNetForImageClassification(config)
    found = target_modules(convolutional, "classifier.1", None)
    assert found and all(isinstance(convolutional.get_submodule(name), nn.Conv2d) for name in found)
    assert target_modules(convolutional, "classifier.1", r".*no_such_layer") == []


def test_lora_on_a_convolutional_model_runs(make_context):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=2, layer_type="basic")
    context = make_context(labels=2, seed=7, model=ResNetForImageClassification(config))
    assert context.head == "classifier.1"
    result = only(context, "lora", Lora(1e-2, steps=3, rank=2))
    assert result.outcome == "completed" and len(result.curve) == 3


def test_nothing_to_target_is_not_applicable_and_not_resistance(make_context):
    result = only(make_context(), "lora", replace(Lora(), targets=r"no\.such\.layer"))
    assert result.outcome == "not_applicable" and result.curve == []
    assert "no linear layer or convolution to adapt" in result.note


def test_from_scratch_runs_through_the_same_attack(make_context):
    result = only(make_context("scratch"), "full_finetune", FullFinetune(1e-2, 3))
    assert result.outcome == "completed" and len(result.curve) == 3


def test_a_pruned_run_is_a_completed_one_that_says_so(make_context):
    attack = ATTACKS["full_finetune"]
    config = attack.config(learning_rate=1e-12, steps=8, batch_size=8)
    ((_, result),) = attack.run(make_context(), [Run(config, "x", 0, (), 0, 1, ((3, 2.0),))])
    assert result.outcome == "completed" and result.note.startswith("pruned at step 3")
    assert result.curve[-1].step == 3 and result.budget == 8
