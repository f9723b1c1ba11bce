"""K̃⁻¹ at a linear layer against a gradient written by hand, with the inverse taken by torch.linalg.inv."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from hf_immunize.data import StepBatchSampler
from hf_immunize.errors import ConfigError, ModelError
from hf_immunize.features import capture_inputs
from hf_immunize.linalg import second_moment_spectrum
from hf_immunize.regularizers import ill_conditioned, well_conditioned

LAYER = "vit.layers.1.mlp.fc2"


def parts_of(model, pixels, labels=None):
    """Head features, inputs of LAYER as rows, and the loss if there are labels."""
    with capture_inputs(model, ["classifier", LAYER]) as caught:
        output = model(pixel_values=pixels, labels=labels)
    return caught["classifier"], caught.raw(LAYER).detach().flatten(0, 1), output.loss


def by_hand(model, primary, harmful, ridge):
    """Weight gradient of LAYER: primary loss, plus each regularizer's times its own normalised K⁻¹."""
    weight = model.get_submodule(LAYER).weight
    features, rows, loss = parts_of(model, primary["pixel_values"], primary["labels"])
    harmful_features, harmful_rows, _ = parts_of(model, harmful["pixel_values"])
    (total,) = torch.autograd.grad(loss, weight, retain_graph=True)
    for term, inputs in (
        (well_conditioned(second_moment_spectrum(features)), rows),
        (ill_conditioned(second_moment_spectrum(harmful_features)), harmful_rows),
    ):
        (gradient,) = torch.autograd.grad(term, weight, retain_graph=True)
        moment = inputs.T @ inputs / len(inputs)
        mean = moment.trace() / len(moment)
        damped = moment + ridge * mean * torch.eye(len(moment), dtype=moment.dtype)
        total = total + gradient @ torch.linalg.inv(damped) * mean * (1 + ridge)
    return total


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_regularizers_gradient_is_multiplied_on_the_input_side(
    make_trainer, make_vit, make_pixels, keep_gradients, accumulation
):
    primary, harmful = make_pixels(24, dtype=torch.float64), make_pixels(30, seed=1, dtype=torch.float64)

    def step(**options):
        keep_gradients.steps.clear()
        trainer = make_trainer(
            model=make_vit(dtype=torch.float64), primary=primary, harmful=harmful, callbacks=[keep_gradients],
            weight="1", strength=1.0, gradient_accumulation_steps=accumulation, max_steps=1, max_grad_norm=0.0,
            per_device_train_batch_size=24 // accumulation, data_seed=5, **options,
        )  # fmt: skip
        trainer.train()
        return keep_gradients.steps[0]

    found, plain = step(precondition_gradients="layers.1.mlp.fc2", precondition_ridge=0.01), step()
    sampler = StepBatchSampler(harmful.labels.tolist(), 12 * accumulation, seed=5)
    rows = sampler.global_batch(0)
    batch = {"pixel_values": harmful.pixel_values[rows]}
    truth = by_hand(make_vit(dtype=torch.float64), vars(primary), batch, 0.01)
    assert torch.allclose(found[f"{LAYER}.weight"], truth, rtol=1e-7, atol=1e-12)
    assert not torch.allclose(plain[f"{LAYER}.weight"], truth, rtol=1e-2)
    for name in found:
        if name != f"{LAYER}.weight":
            assert torch.allclose(found[name], plain[name], rtol=1e-9, atol=1e-13), name


def test_white_inputs_change_nothing():
    from hf_immunize.training.core.preconditioning import Preconditioner

    layer = torch.nn.Sequential(torch.nn.Linear(4, 3)).double()
    inputs = 3 * torch.eye(4, dtype=torch.float64)
    preconditioner = Preconditioner(layer, "0", ridge=0.1)
    inverses = preconditioner.inverses({"0": [inputs]})
    product = functional.linear(inputs, layer[0].weight).pow(3).sum()
    correction = preconditioner.correction(product, inverses)
    correction.backward()
    assert float(correction.detach()) == 0 and layer[0].weight.grad.abs().max() < 1e-10


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"precondition_gradients": "layernorm"}, ConfigError, "trainable linear layers"),
        ({"precondition_gradients": "nowhere"}, ModelError, "a pattern that fits modules"),
        (
            {"precondition_gradients": "vit.layers.0.mlp.fc2", "trainable_modules": "last:1"},
            ConfigError,
            "not frozen",
        ),
        ({"precondition_gradients": "fc2", "gradient_checkpointing": True}, ConfigError, "got both"),
    ],
)
def test_layers_it_cannot_be_applied_to_are_refused(make_trainer, options, error, message):
    with pytest.raises(error, match=message):
        make_trainer(**options)
