"""Precision, micro-batches, checkpoints and lack of memory: the attack stays the one that was asked for."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import pytest
import torch
from test_attack_finetune import only
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments

from hf_immunize.attacks import ATTACKS, Run
from hf_immunize.attacks.core.means import products
from hf_immunize.attacks.core.parts import Parts
from hf_immunize.attacks.vision import _finetune as engine
from hf_immunize.data import ImagePixels
from hf_immunize.errors import ConfigError, DeviceMemoryError, ModelError
from hf_immunize.exam.means import Means

CONFIG = ATTACKS["full_finetune"].config(learning_rate=0.1, steps=6, batch_size=12, optimizer="sgd")
BOUND = 1e-6
"""Of any weight after the steps of CONFIG, in parts against whole batches: float32 rounding of the gradients. Adam
moves a weight whose gradient is nothing but rounding by its whole rate, so that weights may differ; curves do not."""


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[2, 2], num_labels=4, layer_type="basic")
    return ResNetForImageClassification(config)


def trained(context, config=CONFIG, limit=None, name="full_finetune"):
    """Weights and result of one run; a forward with a gradient of more than ``limit`` images runs out of memory."""
    model = context.model_with_new_head(0).requires_grad_(True)
    sizes = []
    if limit is not None:
        def scarce(module, inputs, options):
            if torch.is_grad_enabled():
                sizes.append(len(options["pixel_values"]))
                if sizes[-1] > limit:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        model.register_forward_pre_hook(scarce, with_kwargs=True)
    result = engine.finetune(context, model, config, 0)
    return model.state_dict(), result, sizes


def distance(first, second):
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("means", [Means(micro_batch_size=5), Means(gradient_checkpointing=True),
                                   Means(micro_batch_size=4, gradient_checkpointing=True)])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(make_context, means):
    whole, plain, _ = trained(make_context())
    parts, result, _ = trained(make_context(means=means))
    assert distance(whole, parts) <= (BOUND if means.micro_batch_size else 0.0)
    assert result.curve == plain.curve and result.note is None
    assert (result.samples, result.budget) == (plain.samples, plain.budget)


def test_the_gradient_of_parts_is_the_gradient_of_the_batch_to_double_rounding(make_vit, make_pixels):
    rows, gradients = make_pixels(rows=10, dtype=torch.float64), []
    for size in (10, 3):
        model = make_vit(dtype=torch.float64)

        def backward(place, share, model=model):
            loss = model(pixel_values=rows.pixel_values[place], labels=rows.labels[place]).loss * share
            loss.backward()
            return float(loss.detach())

        with Parts(model, Means(micro_batch_size=size)) as parts:
            losses = parts.step(10, backward)
        assert len(losses) == -(-10 // size)
        gradients.append((sum(losses), [parameter.grad for parameter in model.parameters()]))
    (loss, plain), (other, split) = gradients
    assert loss == pytest.approx(other, rel=1e-13)
    assert all(torch.allclose(one, two, rtol=1e-11, atol=1e-14) for one, two in zip(plain, split, strict=True))


def test_who_runs_out_of_memory_takes_the_same_steps_in_smaller_parts(make_context):
    whole, plain, _ = trained(make_context())
    scarce, result, sizes = trained(make_context(), limit=3)
    assert sizes[:5] == [12, 6, 3, 3, 3] and max(sizes[2:]) == 3, "tried, halved, halved, and never again"
    assert distance(whole, scarce) <= BOUND
    assert result.curve == plain.curve and result.outcome == plain.outcome == "completed"
    assert result.note == "memory ran out: steps in parts of 3 images"


def test_the_rows_and_augmentations_of_a_step_do_not_depend_on_memory(make_context):
    config = ATTACKS["augmented_finetune"].config(learning_rate=0.1, steps=4, batch_size=12, optimizer="sgd")
    whole, plain, _ = trained(make_context(), config)
    scarce, result, _ = trained(make_context(), config, limit=4)
    assert distance(whole, scarce) <= BOUND and result.curve == plain.curve


def test_batch_norms_keep_their_batch_as_long_as_checkpoints_save_enough(make_context, resnet, monkeypatch):
    """The first try runs out of memory in the middle of the network, after some statistics have moved."""
    whole, plain, _ = trained(make_context(model=resnet))
    context = make_context(model=resnet)
    model = context.model_with_new_head(0).requires_grad_(True)
    failed = []

    def once(module, inputs):
        if torch.is_grad_enabled() and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.resnet.encoder.stages[1].register_forward_pre_hook(once)
    result = engine.finetune(context, model, CONFIG, 0)
    assert failed and distance(whole, model.state_dict()) == 0.0, "statistics of batch norms among them"
    assert result.curve == plain.curve and result.note == "memory ran out: gradient checkpointing"
    assert not any("forward" in vars(module) for module in model.modules()), "the model is left as it was"


def test_batch_norms_that_have_to_average_over_parts_are_told(make_context, resnet):
    _, result, sizes = trained(make_context(model=resnet), limit=6)
    assert sizes[:4] == [12, 12, 6, 6]
    assert result.note == "memory ran out: steps in parts of 6 images, over which batch norms average"


@pytest.mark.slow
def test_what_no_smaller_part_helps_is_an_error_that_says_so(make_context):
    with pytest.raises(DeviceMemoryError, match="expected memory for a step of one image at a time, got: CUDA out"):
        trained(make_context(), limit=0)

    class Full(torch.optim.SGD):
        def step(self, closure=None):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.optim.SGD.step", Full.step)
        with pytest.raises(DeviceMemoryError, match="expected memory for weights, gradients and the state of sgd"):
            trained(make_context())

    def fail(place, share):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        Parts(nn.Linear(1, 1), Means()).step(2, fail)
    with pytest.raises(ModelError, match="gradient_checkpointing: expected a list of blocks"):
        Parts(nn.Linear(1, 1), Means(gradient_checkpointing=True))


def test_judging_takes_fewer_rows_when_memory_runs_out(make_context, monkeypatch):
    context, seen = make_context(), []
    plain = only(context, "ridge_probe", ATTACKS["ridge_probe"].config())
    context = make_context()
    forward = type(context.model(0)).forward

    def scarce(self, pixel_values=None, **rest):
        seen.append(len(pixel_values))
        if not torch.is_grad_enabled() and len(pixel_values) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, pixel_values=pixel_values, **rest)

    monkeypatch.setattr(type(context.model(0)), "forward", scarce)
    assert only(context, "ridge_probe", ATTACKS["ridge_probe"].config()).curve == plain.curve
    assert only(context, "full_finetune", CONFIG).outcome == "completed"
    assert max(seen[-3:]) <= 9 < max(seen)


def test_bfloat16_is_what_training_forwards_run_in_and_answers_do_not(make_context):
    context, seen = make_context(means=Means("bf16")), set()
    model = context.model_with_new_head(0).requires_grad_(True)
    model.vit.layers[0].mlp.fc1.register_forward_hook(lambda m, i, out: seen.add((torch.is_grad_enabled(), out.dtype)))
    result = engine.finetune(context, model, CONFIG, 0)
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert result.outcome == "completed" and "forward" not in vars(model)
    whole, _, _ = trained(make_context())
    assert 0 < distance(whole, model.state_dict()) < 0.1


def test_products_are_exact_unless_tf32_is_asked_for():
    def now():
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision

    before = now()
    for precision, wanted in (("float32", "ieee"), ("bf16", "ieee"), ("tf32", "tf32")):
        with products(precision):
            assert now() == (wanted, wanted)
        assert now() == before


def test_means_are_told_where_they_are_not_plain_and_made_again_from_what_is_told(make_context):
    assert Means().described == {} and Means.of({"rank": 4}) == Means()
    means = Means("bf16", 4, True)
    told = make_context(means=means).described
    assert told["precision"] == "bf16" and told["micro_batch_size"] == 4 and told["gradient_checkpointing"] is True
    assert Means.of(told) == means
    assert "precision" not in make_context().described
    for words, message in ((("fp8",), "expected precision in"), (("float32", -1), "expected micro_batch_size of at")):
        with pytest.raises(ConfigError, match=message):
            Means(*words)
    with pytest.raises(ConfigError, match="expected a CUDA device of Ampere or newer for precision tf32, got cpu"):
        make_context(means=Means("tf32"))


def test_several_visible_gpus_never_wrap_the_attacked_model(make_context, monkeypatch):
    found = TrainingArguments._setup_devices

    @cached_property
    def four_gpus(self):
        device, self._n_gpu = found.func(self), 4  # what torch.cuda.device_count() gives where there are four
        return device

    def wrapped(*args, **kwargs):
        raise AssertionError("the model was spread over several GPUs")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", four_gpus)
    four_gpus.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(nn.DataParallel, "__init__", wrapped)
    sizes, context = [], make_context()
    model = context.model_with_new_head(0).requires_grad_(True)
    model.register_forward_pre_hook(
        lambda module, args, options: sizes.append((torch.is_grad_enabled(), len(options["pixel_values"]))),
        with_kwargs=True,
    )
    assert engine.finetune(context, model, CONFIG, 0).outcome == "completed"
    assert {size for grad, size in sizes if grad} == {12}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "heal_finetune", "distil_fresh", "layerwise_finetune", "noisy_finetune"])
def test_every_kind_of_attack_runs_in_parts(make_context, name):
    config = ATTACKS[name].config(steps=4)
    plain = only(make_context(), name, config)
    found = only(make_context(means=Means("float32", 5, True)), name, config)
    assert found.outcome == "completed" and found.note == plain.note
    assert [point.step for point in found.curve] == [point.step for point in plain.curve]
    assert max(abs(a.test - b.test) for a, b in zip(found.curve, plain.curve, strict=True)) <= 1 / 21 + 1e-9


def test_planned_runs_use_the_contexts_means(make_context):
    ((_, result),) = ATTACKS["full_finetune"].run(make_context(means=Means("bf16", 7)), [Run(CONFIG, "x", 0)])
    assert result.outcome == "completed"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full_finetune", "noisy_finetune", "mixed_finetune", "heal_finetune", "distil_fresh",
                                  "ridge_probe", "batchnorm_probe"])
def test_images_on_disk_are_never_all_in_memory(make_context, make_pixels, monkeypatch, resnet, name):
    """Splits that are decoded when they are read, as those of more than 64 MiB are."""
    reads = []

    def on_disk(split):
        def read(rows):
            reads.append((split.name, len(rows)))
            return split.pixel_values[torch.as_tensor(rows)]

        return ImagePixels(read, torch.arange(len(split)), split.labels, split.label_names, split.name)

    for module in ("attacks.vision.context", "attacks.vision._finetune", "data.tasks"):
        monkeypatch.setattr(f"hf_immunize.{module}.forward_rows", lambda *_: 7)
    context = make_context(rows=300, model=resnet, benign=make_pixels(rows=300, classes=2, seed=9))
    splits = {split: getattr(context, split) for split in ("attack", "validation", "test", "benign")}
    for split, rows in splits.items():
        rows.name = split
    stored = replace(context, **{split: on_disk(rows) for split, rows in splits.items()}, prepared={}, _features={})
    config = ATTACKS[name].config(**({} if name.endswith("probe") else {"steps": 4, "batch_size": 8}))
    found = only(stored, name, config)
    assert max(count for split, count in reads if split in ("validation", "test")) <= 7
    assert max(count for split, count in reads if split in ("attack", "benign")) <= 256 < len(context.attack)
    assert found.outcome == "completed"
    assert found.curve == only(context, name, config).curve
