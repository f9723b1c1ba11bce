"""Every family of image classifiers: the objective's gradient reaches the trunk, weights reload plainly, attacks run.

Random weights exercise the code; they support no claim.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from test_gradients import relative_error
from tiny_models import CONFIGS, SIZE, tiny_classifier
from torch import nn
from torch.nn import functional
from transformers import AutoModelForImageClassification

from hf_immunize.attacks import ATTACKS, AttackContext, run_suite
from hf_immunize.data import StepBatchSampler, fingerprint
from hf_immunize.features import find_classifier
from hf_immunize.linalg import second_moment_spectrum
from hf_immunize.records import AttackTrace
from hf_immunize.regularizers import closed_form_adversary, ill_conditioned, well_conditioned

TERMS = {
    "closed_form_adversary": lambda _, harmful, labels: closed_form_adversary(
        harmful, labels, horizon=100.0, memorization=0.5
    ),
    "condition_number": lambda primary, harmful, _: (
        ill_conditioned(second_moment_spectrum(harmful)) + well_conditioned(second_moment_spectrum(primary))
    ),
}
QUICK = {
    "linear_probe_adam": {"steps": (5,), "learning_rate": (1e-2,)},
    "lora": {"steps": (2,), "learning_rate": (1e-3,)},
}


@pytest.fixture(autouse=True, scope="module")
def settled_garbage():
    """Trainer collects garbage once per run; what importing its libraries left behind need not be walked each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def by_hand(
    model: nn.Module, primary, harmful, objective: str, loss_of=functional.cross_entropy
) -> dict[str, torch.Tensor]:
    """Gradient of the primary loss + terms; features are what the model returns when its head is the identity."""
    head = find_classifier(model)
    model.eval()
    trunk = copy.deepcopy(model)
    trunk.set_submodule(head, nn.Identity())
    linear = model.get_submodule(head)
    phi = [trunk(pixel_values=rows.pixel_values).logits for rows in (primary, harmful)]
    loss = loss_of(linear(phi[0]), primary.labels) + TERMS[objective](*phi, harmful.labels)
    loss.backward()
    found = {name: p.grad for name, p in trunk.named_parameters() if p.grad is not None}
    return found | {f"{head}.{name}": p.grad for name, p in linear.named_parameters()}


def attack(folder, make_pixels, tmp_path) -> list[AttackTrace]:
    """A probe and LoRA on what was saved."""
    splits = {name: make_pixels(12, seed=seed, size=SIZE) for seed, name in enumerate(("attack", "val", "test"), 5)}
    context = AttackContext(
        folder, "subject", *splits.values(), tuple(fingerprint(s, source="blobs", role=n) for n, s in splits.items())
    )
    run_suite(context, ATTACKS, list(QUICK), (0,), tmp_path, QUICK)
    return [AttackTrace.read(path) for path in sorted(tmp_path.glob("traces/*/*.json"))]


@pytest.mark.slow
@pytest.mark.parametrize("objective", TERMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_is_the_formulas_and_what_is_saved_reloads_and_can_be_attacked(
    make_trainer, make_pixels, keep_gradients, tmp_path, name, objective
):
    primary, harmful = (make_pixels(12, seed=seed, size=SIZE, dtype=torch.float64) for seed in (0, 1))
    trainer = make_trainer(
        model=tiny_classifier(name).double(), primary=primary, harmful=harmful, callbacks=[keep_gradients],
        objective=objective, horizon="100", memorization=0.5, weight="1", strength=1.0, max_steps=2,
        per_device_train_batch_size=12, max_grad_norm=0.0,
    )  # fmt: skip
    trainer.train()
    rows = StepBatchSampler(harmful.labels.tolist(), 12, seed=7).global_batch(0)
    truth = by_hand(tiny_classifier(name).double(), primary, harmful.subset(rows), objective)
    # An EfficientNet of random weights leaves features of norm 1e-12, whose differences are in their last digits.
    assert relative_error(keep_gradients.steps[0], truth) < (1e-4 if name == "efficientnet" else 1e-8)
    trainer.model.float()
    trainer.save_model(tmp_path / "saved")
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    pixels = primary.pixel_values.float()
    ours, theirs = trainer.model.state_dict(), reloaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    logits = [model.eval()(pixel_values=pixels).logits for model in (trainer.model, reloaded)]
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-5)
    if objective == "closed_form_adversary":
        traces = attack(tmp_path / "saved", make_pixels, tmp_path)
        assert {trace.attack: trace.outcome for trace in traces} == dict.fromkeys(QUICK, "completed")
