"""The attacker's LoRA updates against plain autograd through merged weights: no hooks, no planning, no gathering."""

from __future__ import annotations

import pytest
import torch
from equality import depth, units_apart
from test_gradients import relative_error
from test_imma import by_hand
from torch.func import functional_call
from torch.nn import functional

from hf_immunize.data import StepBatchSampler
from hf_immunize.errors import ConfigError, ModelError
from hf_immunize.regularizers import alternate_within_classes
from hf_immunize.training.vision.lora_attacker import LoraAttacker

LAYERS = [f"vit.layers.{block}.attention.{part}_proj" for block in (0, 1) for part in ("q", "v")]
RANK, RATE, INNER = 2, 0.05, 3


class ByHand:
    """Attacker and defender on one model whose weights stay: merged weights W + 2BA, gradients from autograd."""

    def __init__(self, model, factors):
        self.model = model.eval()
        self.factors = {name: [p.detach().clone().requires_grad_() for p in pair] for name, pair in factors.items()}
        self.optimizer = torch.optim.AdamW([p for pair in self.factors.values() for p in pair], RATE, weight_decay=0.0)
        self.head = torch.zeros(16, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)

    def features(self, pixels):
        """The classifier's input with the updates merged into the weights, divided by the root of λ₁."""
        merged = dict(self.model.named_parameters())
        for name, (down, up) in self.factors.items():
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + 2.0 * up @ down
        trunk = {name.removeprefix("vit."): value for name, value in merged.items() if name.startswith("vit.")}
        phi = functional_call(self.model.vit, trunk, (pixels,)).last_hidden_state[:, 0]
        centred = (phi - phi.mean(0)).detach()
        return phi / torch.linalg.eigvalsh(centred.T @ centred / len(phi))[-1].sqrt()

    def attack(self, rows):
        """One AdamW step down the support loss of the head that ``INNER`` steps of descent reach."""
        support, _ = alternate_within_classes(rows.labels)
        phi = self.features(rows.pixel_values)
        phi = phi[support] - phi[support].mean(0)
        weights, bias = (part.clone().requires_grad_() for part in self.head)
        for _ in range(INNER):
            loss = functional.cross_entropy(phi.detach() @ weights + bias, rows.labels[support])
            dw, db = torch.autograd.grad(loss, (weights, bias))
            weights, bias = (weights - dw).detach().requires_grad_(), (bias - db).detach().requires_grad_()
        loss = functional.cross_entropy(phi @ weights.detach() + bias.detach(), rows.labels[support])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss)

    def defend(self, primary, rows):
        """Gradient of cross-entropy + the attacker's gain on the query rows, the updates held."""
        self.model.zero_grad()
        phi = self.features(rows.pixel_values)
        one = torch.ones((), dtype=torch.float64)
        loss = by_hand(phi, rows.labels, *self.head, one, INNER)
        loss = loss + functional.cross_entropy(self.model(primary.pixel_values).logits, primary.labels)
        loss.backward()
        self.head = trained_head(phi.detach(), rows.labels, self.head)
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


def trained_head(phi, labels, head):
    support, _ = alternate_within_classes(labels)
    phi = phi[support] - phi[support].mean(0)
    weights, bias = (part.clone().requires_grad_() for part in head)
    optimizer = torch.optim.SGD([weights, bias], lr=1.0)
    for _ in range(INNER):
        optimizer.zero_grad()
        functional.cross_entropy(phi @ weights + bias, labels[support]).backward()
        optimizer.step()
    return weights.detach(), bias.detach()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_factors_and_the_defenders_gradient_are_those_of_merged_weights(
    make_trainer, make_vit, make_pixels, keep_gradients, accumulation
):
    primary, harmful = make_pixels(24, dtype=torch.float64), make_pixels(30, seed=1, dtype=torch.float64)
    trainer = make_trainer(
        model=make_vit(dtype=torch.float64), primary=primary, harmful=harmful, callbacks=[keep_gradients],
        objective="imma", weight="1", strength=1.0, attacker_steps=INNER, attacker_lora_rank=RANK,
        attacker_lora_rate=RATE, learning_rate=0.0, max_steps=3, max_grad_norm=0.0, data_seed=5,
        gradient_accumulation_steps=accumulation, per_device_train_batch_size=24 // accumulation,
    )  # fmt: skip
    assert list(trainer.attacker.factors) == LAYERS
    slow = ByHand(make_vit(dtype=torch.float64), trainer.attacker.factors)
    trainer.train()
    sampler = StepBatchSampler(harmful.labels.tolist(), 12 * accumulation, seed=5)
    losses = [entry["attacker_lora_loss"] for entry in trainer.state.log_history if "attacker_lora_loss" in entry]
    for step in range(3):
        rows = sampler.global_batch(step).chunk(accumulation)
        batch = harmful.subset(torch.cat(rows))
        assert losses[step] == pytest.approx(slow.attack(batch), rel=1e-9)
        assert relative_error(keep_gradients.steps[step], slow.defend(primary, batch)) < 1e-9
    for name, pair in trainer.attacker.factors.items():
        for ours, theirs in zip(pair, slow.factors[name], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-10)
        assert float(pair[1].abs().max()) > 0.01  # B has left zero


def test_the_updates_start_as_nothing_leave_no_trace_and_come_back_from_a_checkpoint(make_vit, make_pixels):
    model, pixels = make_vit().eval(), make_pixels(12).pixel_values
    plain = model(pixels).logits
    attacker = LoraAttacker(model, "classifier", rank=2, rate=0.1, seed=0)
    with attacker.attached(model):
        assert units_apart(model(pixels).logits, plain) <= depth(model)

    def learn(which):
        def forward():
            with which.attached(model, learning=True):
                return model.vit(pixels).last_hidden_state[:, 0], torch.arange(12) % 3

        return float(which.learn([forward], lambda rows: (rows.features.mean(0) - 3.0).square().mean()))

    losses = [learn(attacker) for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and all(p.grad is None for p in model.parameters())
    with attacker.attached(model):
        assert not torch.allclose(model(pixels).logits, plain)
    assert torch.equal(model(pixels).logits, plain)
    other = LoraAttacker(model, "classifier", rank=2, rate=0.1, seed=1)
    other.load_state({name: value.clone() for name, value in attacker.state().items()})
    assert learn(attacker) == learn(other)  # factors came back
    assert learn(attacker) == learn(other)  # and so did the optimizer's moments


@pytest.mark.parametrize(
    "options,message",
    [
        ({"objective": "imma+ill_only"}, "objective imma alone at sites=head"),
        ({"sites": "lora"}, "objective imma alone at sites=head"),
        ({"gradient_checkpointing": True}, "neither activation_checkpointing nor cache_frozen_features"),
        ({"attacker_lora_rank": -1}, "attacker_lora_rank of at least 0"),
    ],
)
def test_combinations_that_are_refused(make_trainer, options, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(**({"objective": "imma", "attacker_lora_rank": 2} | options))


def test_a_network_without_linear_layers_is_refused(make_trainer, make_pixels):
    from tiny_models import SIZE, tiny_classifier

    rows = make_pixels(24, size=SIZE)
    with pytest.raises(ModelError, match="linear layers besides the head"):
        make_trainer(
            model=tiny_classifier("resnet"), primary=rows, harmful=rows, objective="imma", attacker_lora_rank=2
        )
