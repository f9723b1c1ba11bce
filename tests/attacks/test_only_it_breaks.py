"""For attacks that train: a planted model that stops their plain relatives, but not them. Slow."""

from __future__ import annotations

import pytest
import torch
from gated_vit import distrusting, make_gated, shut, tripwire
from test_attack_finetune import only
from test_attack_preparations import config

from hf_immunize.data import PixelDataset

pytestmark = pytest.mark.slow

STEPS = 40
RATES = (1e-5, 1e-4, 1e-3, 1e-2)


def reached(context, name, rates=RATES, steps=STEPS):
    """The best test accuracy over rates."""
    found = [only(context, name, config(name, learning_rate=rate, steps=steps)) for rate in rates]
    assert all(result.outcome == "completed" for result in found), [result.note for result in found]
    return max(point.test for result in found for point in result.curve)


@torch.no_grad()
def cancelling(model, blocks, size):
    """Two hidden units of some blocks are made equal, and what they add to the stream large and opposite.

    The model computes what it did, but for one unit; a step that moves the two apart drowns the stream.
    """
    for block in model.vit.layers[blocks]:
        first, second = block.mlp.fc1, block.mlp.fc2
        first.weight[1], first.bias[1], second.weight[:, 1] = first.weight[0], first.bias[0], second.weight[:, 0] * 0
        direction = torch.linspace(-1, 1, second.weight.shape[0])
        second.weight[:, 0] += size * direction
        second.weight[:, 1] -= size * direction
    return model


@torch.no_grad()
def shifted(model, size):
    """Features with a large common offset, which the model's own head takes back."""
    model.vit.layernorm.bias.add_(size)
    model.classifier.bias.sub_(size * model.classifier.weight.sum(dim=1))
    return model


@pytest.fixture
def attacked(make_context, make_vit):
    """A context of a small ViT on which something was planted."""

    def build(change, seed):
        return make_context("subject", seed=seed, model=change(make_vit(labels=4, layers=4)), rows=90)

    return build


def test_late_blocks_that_break_when_they_are_trained_leave_the_input_side_to_train(attacked):
    context = attacked(lambda model: cancelling(model, slice(3, 4), 1e4), 41)
    assert reached(attacked(lambda model: model, 40), "full_finetune", (1e-3,)) > 0.8
    plain, layerwise = (reached(context, name, (1e-4, 1e-3, 1e-2)) for name in ("full_finetune", "layerwise_finetune"))
    assert plain < 0.55 and layerwise > 0.65, (plain, layerwise)


def test_features_far_from_zero_hold_a_random_head_up_and_not_a_solved_one(attacked):
    context = attacked(lambda model: shifted(model, 300.0), 42)
    assert reached(context, "lora_all_linear") < 0.5
    assert reached(context, "probe_then_lora", (1e-4,)) > 0.8


def test_a_gate_that_is_just_shut_stays_so_for_who_sees_only_shut_images_and_not_after_healing(
    make_context, make_pixels
):
    """No gradient gets through, nor with a little noise; healing, on whatever images, moves what lies before it."""
    harmful, others = (make_pixels(rows=90, classes=3, seed=seed) for seed in (0, 7))
    brighter = others.pixel_values + torch.tensor([3.0, 0, 0]).view(3, 1, 1)
    benign = PixelDataset(brighter, others.labels, others.label_names)
    model = shut(make_gated(1), harmful.pixel_values, brighter, margin=0.2)
    own, given = (make_context("subject", seed=43, model=model, rows=90, benign=rows) for rows in (None, benign))
    assert reached(make_context("subject", seed=44, model=make_gated(1), rows=90), "full_finetune", (1e-3,)) > 0.8
    for plain in ("full_finetune", "noisy_finetune"):
        assert reached(own, plain) < 0.45, plain
    for context in (own, given):
        assert reached(context, "heal_finetune", (1e-3, 1e-2)) > 0.6


def test_a_tripwire_that_only_small_rates_leave_alone_needs_a_head_that_learns_faster(make_context):
    """At 1e-3 and above the gate is gone at once; a new head hardly moves at the rates below."""
    models = tripwire(make_gated(2), 3e3), make_gated(2)
    planted, open_ = (
        make_context("subject", seed=45 + place, model=made, rows=90) for place, made in enumerate(models)
    )
    assert reached(open_, "full_finetune", (1e-3,), steps=80) > 0.8
    assert reached(planted, "full_finetune", steps=80) < 0.6
    assert reached(planted, "head_rate_finetune", (1e-5, 1e-4), steps=80) > 0.8


def test_a_gate_that_shuts_when_batches_differ_lets_only_batches_of_all_rows_through(make_context, make_pixels):
    """Batches of 32 out of 72 rows never have the mean of the one before; in evaluation nothing is shut."""
    rows = make_pixels(rows=90, classes=3, seed=0).pixel_values
    models = distrusting(make_gated(1), 0.15, rows), make_gated(1)
    planted, open_ = (
        make_context("subject", seed=47 + place, model=made, rows=90) for place, made in enumerate(models)
    )
    assert reached(open_, "full_finetune", (1e-3,)) > 0.8
    assert reached(planted, "full_finetune", steps=80) < 0.45
    assert reached(planted, "large_batch_finetune", (1e-4, 1e-3), steps=80) > 0.6
