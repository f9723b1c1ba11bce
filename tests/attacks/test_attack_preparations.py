"""What the newer attackers do, and planted models that they break and the plain attacks do not."""

import copy
from dataclasses import replace

import pytest
import torch
from test_attack_finetune import only
from test_cancelling import with_near_twins
from test_canonical import convolutions_before_norms, huge_gains
from test_centring import with_means, with_sums
from test_loud import with_unread_unit
from test_twins import with_twins
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_immunize.attacks import ATTACKS, Run, plan_trials
from hf_immunize.attacks.core.shape import evaluation_steps
from hf_immunize.attacks.vision import _optimizers as optimizers
from hf_immunize.attacks.vision import _preparations as first
from hf_immunize.attacks.vision._row import config_of
from hf_immunize.attacks.vision.all_layers_probe import side_by_side
from hf_immunize.attacks.vision.heal import heal, healing

RATES = {"full_finetune": (1e-4, 1e-3, 1e-2)}


def config(name, **values):
    return ATTACKS[name].config(**values)


def reached(context, name, steps=30, **values):
    """Best test accuracy of an attack over its rates."""
    rates = [values.pop("learning_rate")] if "learning_rate" in values else RATES.get(name, (1e-3,))
    found = [only(context, name, config(name, learning_rate=rate, steps=steps, **values)) for rate in rates]
    assert all(result.outcome == "completed" for result in found), [result.note for result in found]
    return max(point.test for result in found for point in result.curve)


@pytest.fixture
def digits(digits_base, make_context):
    """A context of a ViT that knows the digits 0-4, attacked with blobs; ``change`` plants something first."""
    from transformers import AutoModelForImageClassification

    def build(change, seed):
        model = change(AutoModelForImageClassification.from_pretrained(digits_base))
        return make_context("subject", labels=5, seed=seed, model=model, rows=90)

    return build


@pytest.mark.slow
def test_gains_that_the_next_layer_divides_away_stop_plain_attacks_and_not_the_normal_form_nor_relative_steps(digits):
    plain, planted = digits(lambda model: model, 11), digits(huge_gains, 12)
    assert reached(plain, "full_finetune") > 0.9
    assert reached(planted, "full_finetune") < 0.7
    assert reached(planted, "canonical_finetune", learning_rate=1e-3) > 0.9
    assert reached(planted, "relative_finetune", learning_rate=1e-2) > 0.9
    assert reached(planted, "relative_finetune", learning_rate=1e-2, optimizer="adafactor_relative") > 0.75
    one, other = (
        only(context, "canonical_lora", config("canonical_lora", learning_rate=1e-2, steps=8))
        for context in (plain, planted)
    )
    assert "normal form: 7 norms" in one.note and len(one.curve) == len(other.curve)
    for ours, theirs in zip(one.curve, other.curve, strict=True):  # up to rounding they are one network
        assert ours.test == pytest.approx(theirs.test, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("harmless, planted", [
    (lambda model: model, lambda model: with_means(model, "vit")),
    (lambda model: model, lambda model: with_sums(model, 1e4)),
    (lambda model: with_twins(model, 0.0), lambda model: with_twins(model, 1e3)),
    (lambda model: with_near_twins(model, 0.0), lambda model: with_near_twins(model, 1e3, 1e-6)),
    (lambda model: with_unread_unit(model, 0.0), lambda model: with_unread_unit(model, 2.0**20)),
], ids=["means", "sums", "twins", "near twins", "unread units"])  # fmt: skip
def test_what_is_nothing_to_the_function_hinders_plain_fine_tuning_and_not_that_of_the_normal_form(
    digits, harmless, planted
):
    contexts = digits(harmless, 14), digits(planted, 15)
    plain = [reached(context, "full_finetune", learning_rate=1e-2) for context in contexts]
    assert plain[1] < 0.8 and plain[0] > 0.9, plain
    settings = config("canonical_finetune", learning_rate=1e-3, steps=30)
    one, other = ([point.test for point in only(context, "canonical_finetune", settings).curve] for context in contexts)
    assert max(one) > 0.9 and one == pytest.approx(other, abs=0.15)


@pytest.fixture
def trained_mobilenet(make_pixels):
    """A small MobileNetV2 that knows two classes of blobs."""
    torch.manual_seed(0)
    model = MobileNetV2ForImageClassification(MobileNetV2Config(
        image_size=32, depth_multiplier=0.25, depth_divisible_by=4, num_labels=2, classifier_dropout_prob=0.0,
    ))  # fmt: skip
    rows, optimizer = make_pixels(rows=64, classes=2, seed=9, size=8), torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        model(pixel_values=rows.pixel_values, labels=rows.labels).loss.backward()
        optimizer.step()
    return model


@pytest.mark.slow
def test_convolutions_scaled_before_batch_norms_have_the_normal_form_of_the_plain_ones(make_context, trained_mobilenet):
    lengths = {}
    for seed, change in ((1, lambda model: model), (2, convolutions_before_norms)):
        context = make_context(labels=2, seed=seed, model=change(copy.deepcopy(trained_mobilenet)))
        lengths[seed] = {}
        for name in ("full_finetune", "canonical_finetune"):
            model = (first.unfrozen if name == "full_finetune" else first.canonical)(context, Run(None, "x", 0))
            weight = next(module for module in model.modules() if isinstance(module, nn.Conv2d)).weight
            lengths[seed][name] = float(weight.detach().flatten(1).norm(dim=1).mean())
    assert lengths[2]["full_finetune"] == pytest.approx(1000 * lengths[1]["full_finetune"], rel=1e-4)
    assert lengths[1]["canonical_finetune"] == pytest.approx(1.0, rel=1e-4)
    assert lengths[2]["canonical_finetune"] == pytest.approx(1.0, rel=1e-4)


@pytest.mark.slow
def test_dropout_in_the_config_hinders_plain_fine_tuning_alone(digits):
    def dropping(model):
        model.config.hidden_dropout_prob = 0.97
        return model

    planted = digits(dropping, 13)
    assert any(module.p > 0.9 for module in planted.model(0).modules() if isinstance(module, nn.Dropout))
    assert reached(planted, "full_finetune", 20) < 0.8
    assert reached(planted, "canonical_finetune", 20, learning_rate=1e-3) > 0.9


def resnet(**changes):
    torch.manual_seed(0)
    return ResNetForImageClassification(ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2, layer_type="basic", **changes,
    ))  # fmt: skip


def test_gains_of_zero_are_dead_for_every_gradient_and_not_for_new_norms(make_context):
    model = resnet()
    with torch.no_grad():
        norm = model.resnet.embedder.embedder.normalization
        norm.weight.zero_(), norm.bias.zero_()
    context = make_context(labels=2, seed=21, model=model)
    assert reached(context, "full_finetune", 20) < 0.5
    assert reached(context, "reset_norms_finetune", 40, learning_rate=1e-2) > 0.8
    planned = Run(config("reset_norms_finetune"), "x", 1)
    norms = [module for module in first.new_norms(context, planned).modules() if isinstance(module, _BatchNorm)]
    assert all(norm.momentum == 0.1 for norm in norms)  # training goes on with the usual averages
    assert all(bool((norm.weight == 1).all()) and bool((norm.bias == 0).all()) for norm in norms)
    rows = context.attack.subset(context.draw_rows(1)).pixel_values
    with torch.no_grad():
        mean = context.model(0).resnet.embedder.embedder.convolution(rows).mean(dim=(0, 2, 3))
    assert torch.allclose(norms[0].running_mean, mean, atol=1e-5)


def test_layers_that_tell_a_part_each_tell_everything_together(make_context):
    """Every block says whether a row is of one class; the head's input says nothing."""
    context = make_context()
    sites = ["vit.layers.1", "vit.layernorm"]
    noise = torch.Generator().manual_seed(0)
    for place, site in enumerate((*sites, context.head)):
        context._features[None, site] = {
            name: torch.stack([(split.labels == place).float() * (place < 2), torch.zeros(len(split))], dim=1)
            + 0.01 * torch.randn(len(split), 2, generator=noise)
            for name, split in (("attack", context.attack), ("validation", context.validation), ("test", context.test))
        }
    for depth in (0.0, 1.0):
        alone = only(context, "earlier_layer_probe", config("earlier_layer_probe", depth=depth))
        assert alone.curve[0].test < 0.9
    assert only(context, "all_layers_probe", config("all_layers_probe")).curve[0].test == 1.0
    assert side_by_side(context, 0, sites)["test"].shape == (len(context.test), 6)


def test_ordinary_lora_is_among_the_trials_of_any_search():
    for trials in (None, 4, 32):
        told = [chosen for chosen, _ in plan_trials(ATTACKS["lora_all_linear"], None, trials)]
        ordinary = [one for one in told if one.learning_rate == 1e-3 and one.rank == 8 and one.scheduler == "constant"]
        assert len(ordinary) == 1 and ordinary[0].targets == "all-linear"


def test_low_rank_updates_go_on_every_linear_layer(make_context):
    model = first.lora(make_context(), Run(config("lora_all_linear"), "x", 0))
    names = [name for name, _ in model.named_modules() if "lora_A.d" in name]
    adapted = {name.rsplit(".lora_A", 1)[0].rsplit(".", 1)[-1] for name in names}
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"} <= adapted and "classifier" not in adapted


def test_probe_then_lora_starts_at_the_ridge_probe(make_context):
    context = make_context()
    still = only(context, "probe_then_lora", config("probe_then_lora", learning_rate=0.0, steps=1), 2)
    wanted = only(context, "ridge_head_finetune", config("ridge_head_finetune", learning_rate=0.0, steps=1), 2)
    assert still.curve == wanted.curve


def test_the_head_has_a_rate_of_its_own(make_context):
    model = first.unfrozen(make_context(), Run(None, "x", 0))
    told = config("head_rate_finetune", learning_rate=1e-3, head_factor=50.0)
    others, own = optimizers.adamw_head(model, told).param_groups
    assert (others["lr"], own["lr"]) == (1e-3, pytest.approx(0.05))
    assert {tuple(value.shape) for value in own["params"]} == {(3, 16), (3,)}
    assert len(others["params"]) + 2 == len(list(model.parameters()))


@pytest.mark.parametrize("optimizer", [optimizers.Lamb, optimizers.Lars])
def test_lamb_and_lars_move_every_tensor_by_the_rate_times_its_length(optimizer):
    generator = torch.Generator().manual_seed(0)
    tensors = [nn.Parameter(scale * torch.randn(5, 3, generator=generator)) for scale in (1e-6, 1.0, 1e6)]
    before = [value.detach().clone() for value in tensors]
    for value, scale in zip(tensors, (1e8, 1.0, 1e-25), strict=True):  # the square of the last one is 0 in float32
        value.grad = scale * torch.randn(5, 3, generator=generator)
    optimizer(tensors, 0.01).step()
    for value, old in zip(tensors, before, strict=True):
        assert float((value - old).norm() / old.norm()) == pytest.approx(0.01, rel=1e-4)
        assert torch.equal((value - old).sign(), -value.grad.sign())


def test_lars_is_momentum_on_rates_of_each_tensor_with_its_decay():
    """w <- w - v, v <- 0.9 v + lr ‖w‖/(‖g‖ + β‖w‖) (g + βw); a tensor that is zero takes the plain gradient."""
    weight, fresh = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.zeros(2))
    found = optimizers.Lars([weight, fresh], 0.1, weight_decay=0.5)
    expected, velocity = torch.tensor([3.0, 4.0]), torch.zeros(2)
    for gradient in (torch.tensor([0.0, 2.0]), torch.tensor([1.0, -1.0])):
        weight.grad, fresh.grad = gradient.clone(), torch.tensor([1.0, 0.0]) if not fresh.any() else None
        rate = 0.1 * expected.norm() / (gradient.norm() + 0.5 * expected.norm())
        velocity = 0.9 * velocity + rate * (gradient + 0.5 * expected)
        expected = expected - velocity
        found.step()
        assert torch.allclose(weight, expected, atol=1e-6)
    assert torch.allclose(fresh, torch.tensor([-0.1, 0.0]))


def test_muon_orthogonalises_kernels_and_leaves_depthwise_ones_to_adam():
    torch.manual_seed(0)
    kernel, depthwise = nn.Parameter(torch.randn(4, 3, 2, 2)), nn.Parameter(torch.randn(4, 1, 3, 3))
    channels_last = nn.Parameter(kernel.detach().clone().to(memory_format=torch.channels_last))
    flat = nn.Parameter(kernel.detach().flatten(1).clone())
    ours = optimizers.MuonAdamW([kernel, channels_last, depthwise], 0.1, 0.0)
    theirs = torch.optim.Muon([flat], lr=0.1, weight_decay=0.0)
    kernel.grad, depthwise.grad = torch.cos(kernel.detach()), torch.cos(depthwise.detach())
    channels_last.grad, flat.grad = kernel.grad.clone(), kernel.grad.flatten(1).clone()
    ours.step(), theirs.step()
    assert torch.equal(kernel.flatten(1), flat) and torch.equal(channels_last, kernel)
    assert [len(group["params"]) for group in ours.param_groups] == [2, 1]


def test_healing_spends_its_share_and_keeps_what_the_model_says_on_clean_images(make_context):
    context = make_context()
    told = config("heal_finetune", steps=40, share=0.5, learning_rate=1e-3)
    assert healing(told) == 20
    before, after = context.model(0), heal(context, context.model(0), told, 0)
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert max(float((one - other).abs().max()) for one, other in pairs) > 1e-3
    with torch.no_grad():
        wanted, found = (
            model.eval()(pixel_values=context.attack.pixel_values).logits.softmax(dim=1) for model in (before, after)
        )
    assert float((wanted - found).abs().max()) < 0.25
    result = only(context, "heal_finetune", replace(told, steps=10))
    assert result.curve[0].step == 6 and result.curve[-1].step == 10


def test_layers_are_trained_from_the_input_side_one_after_the_other(make_context, make_vit):
    context = make_context(labels=4, seed=31, model=make_vit(labels=4, layers=4))
    told = config("layerwise_finetune", steps=8, share=0.5, parts=2)
    model = first.layerwise(context, Run(told, "x", 0)).train()
    trained = []
    for step in range(5):
        model.before_step(step)
        trained.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})
    early, late = "vit.layers.0.mlp.fc1.weight", "vit.layers.3.mlp.fc1.weight"
    assert [early in names for names in trained] == [True, True, False, False, True]
    assert [late in names for names in trained] == [False, False, True, True, True]
    assert all("classifier.weight" in names for names in trained)
    assert "vit.embeddings.cls_token" in trained[0] and "vit.layernorm.weight" in trained[2]
    result = only(context, "layerwise_finetune", told)
    assert [point.step for point in result.curve] == evaluation_steps(8, 1.5)


def test_a_row_keeps_the_order_and_the_help_of_the_fields_it_fixes():
    from hf_immunize.attacks.vision._finetune import FinetuneConfig

    made = config_of("Told.", FinetuneConfig, {"batch_size": 4})
    assert made.__doc__ == "Told." and made(1e-2, 7).steps == 7 and made().batch_size == 4
    field = made.__dataclass_fields__["batch_size"]
    assert field.metadata["help"] == "Rows per step." and "search" not in field.metadata
    assert all(attack.covers for attack in ATTACKS.values())
