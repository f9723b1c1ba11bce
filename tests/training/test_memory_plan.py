"""The model of memory against plain sums, and against what autograd really keeps."""

from __future__ import annotations

import diffusers
import pytest
import torch
from denoiser_builders import FAMILIES, build_denoiser
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_immunize.training import ImmunizationConfig
from hf_immunize.training.core.memory import Options, fake, memory_of, moment_bytes, units, watch_forward
from hf_immunize.training.diffusion import DiffusionImmunizationConfig
from hf_immunize.training.diffusion.optimizers import optimizer_of
from hf_immunize.training.diffusion.planning import activations_of, condition_shapes, latent_shape, plan_memory
from hf_immunize.training.vision.planning import plan_memory as plan_classifier

SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
        "num_labels": 3}


def meta(family: str):
    with torch.device("meta"):
        return getattr(diffusers, FAMILIES[family][0])(**FAMILIES[family][1])


def kept_by_autograd(model, forward) -> int:
    """Bytes of the distinct storages that a real forward saves, parameters and buffers apart."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that the address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(size for size, _ in found.values())


def test_activations_are_those_that_a_real_forward_keeps():
    model = ViTForImageClassification(ViTConfig(**SIZE)).train()
    pixels = torch.randn(5, 3, 32, 32)
    truth = kept_by_autograd(model, lambda: model(pixel_values=pixels))
    with torch.device("meta"):
        hollow = ViTForImageClassification(ViTConfig(**SIZE)).train()
    with fake(hollow):
        found = watch_forward(hollow, lambda: hollow(pixel_values=torch.empty(5, 3, 32, 32)))
    assert found.bytes() == pytest.approx(truth, rel=0.05)
    assert found.bytes(checkpointing=True) < found.bytes() and len(found.blocks) >= 3


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_activations_of_every_family_are_close_to_those_of_a_real_forward(family):
    from hf_immunize.diffusion import denoiser_of

    model = build_denoiser(family).train()
    shapes = condition_shapes(model)
    conditions = {name: torch.zeros(2, dtype=torch.long) if name == "class_labels" else torch.randn(2, *shape)
                  for name, shape in shapes.items()}
    latents = (*latent_shape(model)[:1], 8, 8)
    call = denoiser_of(model).call
    truth = kept_by_autograd(model, lambda: call(model, torch.randn(2, *latents), torch.zeros(2).long(), conditions))
    found = activations_of(meta(family), 2, latents)
    assert found.bytes() == pytest.approx(truth, rel=0.1)
    twice = activations_of(meta(family), 4, latents)
    assert 1.8 < twice.bytes() / found.bytes() < 2.1


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"])
def test_moments_are_what_the_optimizer_holds_after_a_step(tmp_path, optim):
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((300, 200), (70,), (5, 6, 7), ())]
    args = DiffusionImmunizationConfig(str(tmp_path), optim=optim, use_cpu=True)
    optimizer = optimizer_of(args, nn.Linear(1, 1), parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values()
               if isinstance(value, torch.Tensor) and value.dim())
    assert moment_bytes(parameters, optim) == pytest.approx(held, abs=64)


def test_what_each_option_adds_is_written_out():
    model = nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 10))
    model[0].requires_grad_(False)
    everything, mine = 4 * (100 * 50 + 50 + 50 * 10 + 10), 4 * (50 * 10 + 10)

    def found(**options):
        return memory_of(model, 1000, Options(**options))

    plain = found()
    assert (plain.weights, plain.moments, plain.gradients) == (everything, 2 * mine, mine)
    assert plain.peak == everything + 3 * mine and plain.host == 0
    assert memory_of(model, 10**6, Options()).peak == everything + 2 * mine + 10**6
    assert found(accumulation=2).peak == plain.peak + 1000
    both = found(primary=0.25)  # two forwards and one backward: a whole gradient beside the primary rows' activations
    assert both.peak == plain.peak + 250
    assert found(primary=0.25, accumulation=2).peak == plain.peak + max(1000, mine + 250)
    assert memory_of(model, 10**6, Options(primary=0.25)).peak == everything + 2 * mine + 10**6
    assert found(primary=0.25, accumulation=2, sharded=True).peak == plain.peak + 1000
    assert found(teacher=True, average=True).peak == plain.peak + 2 * mine
    assert (found(guard=True).host, found(guard=True, average=True).host_momentary) == (2 * mine, 2 * mine)
    assert found(optim="adamw_torch").peak == plain.peak + mine
    assert found(devices=8).peak == plain.peak + mine  # DDP's buckets
    sharded = found(devices=8, sharded=True)
    assert sharded.resident == pytest.approx(plain.resident / 8)
    assert sharded.gathered == 2 * 4 * (100 * 50 + 50)
    attacked = found(attacker="all")
    assert attacked.attacker == everything and attacked.peak == plain.peak + everything + 4 * everything + 1000


def test_a_denoisers_plan_follows_its_options():
    def plan(trainable="all", half=False, **options):
        model = meta("sdxl").to(torch.bfloat16) if half else meta("sdxl")
        options = {"objective": "ill_only", "use_cpu": True, "trainable": trainable} | options
        args = DiffusionImmunizationConfig("out", **options)
        return plan_memory(model, args, latents=(4, 8, 8))

    count = sum(parameter.numel() for parameter in meta("sdxl").parameters())
    full, lora, half = plan(), plan("lora"), plan("lora", True)
    assert full.weights == 4 * count and full.gradients == 4 * count and full.moments == pytest.approx(8 * count)
    factors = lora.gradients
    assert factors < full.gradients / 5 and lora.weights == 4 * count + factors
    assert half.weights == 2 * count + factors and half.gradients == factors
    assert plan(gradient_checkpointing=True).activations < full.activations
    assert plan(per_device_train_batch_size=64).activations > full.activations
    assert plan(objective="simulated_attack").attacker == 4 * count
    assert plan(distillation=1.0).teacher == 4 * count and plan(max_loss_factor=1.1).host == 8 * count


def test_a_classifiers_plan_follows_its_options(tmp_path):
    def plan(**options):
        with torch.device("meta"):
            model = ViTForImageClassification(ViTConfig(**SIZE))
        args = ImmunizationConfig(str(tmp_path), use_cpu=True, report_to="none", **options)
        return plan_classifier(model, args, (3, 32, 32))

    plain, last = plan(), plan(trainable_modules="last:1")
    assert last.weights == plain.weights and last.gradients < plain.gradients
    assert last.activations < plain.activations  # the frozen part keeps nothing
    assert plan(distillation=1.0).teacher == plain.gradients
    assert plan(max_primary_drop=1.0).host == 2 * plain.gradients


def test_blocks_are_what_repeats():
    with torch.device("meta"):
        vit = ViTForImageClassification(ViTConfig(**SIZE))
    assert {type(unit).__name__ for unit in units(vit)} >= {"ViTLayer"}
    assert {type(unit).__name__ for unit in units(meta("flux"))} == {
        "FluxTransformerBlock", "FluxSingleTransformerBlock"
    }
