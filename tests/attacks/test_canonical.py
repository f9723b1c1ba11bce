"""The normal form: the same function, and the same weights whatever coordinates they came in."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

sys.path.insert(0, str(Path(__file__).parents[1]))

from vision_builders import build_classifier, image_size

from hf_immunize.attacks.vision.canonical import canonicalise
from hf_immunize.attacks.vision.canonical.operations import find_anatomy
from hf_immunize.attacks.vision.canonical.products import balanced
from hf_immunize.attacks.vision.canonical.scales import Roots, rescale
from hf_immunize.features import find_classifier

FOLLOWED = [
    "vit", "deit", "dinov2", "beit", "clip", "swin", "convnext", "resnet", "mobilenet_v2", "efficientnet", "levit",
    "focalnet", "swinv2", "cvt", "hiera", "bit", "poolformer", pytest.param("mobilevitv2", marks=pytest.mark.slow),
]  # fmt: skip


def pixels(name, rows=4):
    side = image_size(name)
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model, images):
    return model(pixel_values=images.to(next(model.parameters()).dtype)).logits


def gap(one, other):
    """Largest difference of two models' parameters, each in units of the largest entry of its tensor."""
    others = dict(other.named_parameters())
    return max(
        float((value.detach() - others[name].detach()).abs().max() / value.detach().abs().max().clamp(min=1e-12))
        for name, value in one.named_parameters()
    )


@pytest.mark.parametrize("name", FOLLOWED)
def test_any_change_of_scales_has_the_same_normal_form(name):
    """Every channel whose scale is free is scaled by e^N(0, 9); then nothing of it may be left."""
    model, images = build_classifier(name, dtype=torch.float64), pixels(name)
    anatomy, planted = find_anatomy(model, images.double()), copy.deepcopy(model)
    for turn, way in enumerate([*anatomy.others, anatomy]):
        roots = Roots(way)
        roots.log = 3 * torch.randn(roots.count, generator=torch.Generator().manual_seed(turn), dtype=torch.float64)
        roots.log[0] = 0
        rescale(way, planted, roots)
    assert bool(anatomy.others) == (name in ("focalnet", "mobilevitv2", "poolformer"))
    assert torch.allclose(logits(planted, images), logits(model, images), rtol=1e-6, atol=1e-9)
    one, other = (canonicalise(found, find_classifier(model), images) for found in (model, planted))
    assert one.changed and other.changed and max(one.error, other.error) < 1e-10
    assert gap(model, planted) > 1
    assert gap(one.model, other.model) < (1e-3 if anatomy.others else 1e-6)  # three ways are settled in turn


def test_running_statistics_follow_whatever_the_config_says():
    model, images = build_classifier("mobilenet_v2", dtype=torch.float64), pixels("mobilenet_v2")
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.momentum = 1e-6
    found = canonicalise(model, find_classifier(model), images)
    assert {norm.momentum for norm in found.model.modules() if isinstance(norm, _BatchNorm)} == {0.1}


@torch.no_grad()
def factors(model, power):
    """Scales that products of activations, and lengths by which something is divided, keep from the outputs."""
    for block in model.modules():
        if type(block).__name__ == "FocalNetModulation":
            width = block.projection_in.in_features
            for values in (block.projection_in.weight, block.projection_in.bias):
                values[:width] *= 2.0**power
            for values in (block.projection_context.weight, block.projection_context.bias):
                values *= 2.0 ** (power / 2)
            block.projection_out.weight *= 2.0 ** (-1.5 * power)
        if type(block).__name__ == "Swinv2SelfAttention":
            for values in (*block.query.parameters(), *block.key.parameters()):
                values *= 2.0**power
        if type(block).__name__ == "WeightStandardizedConv2d":
            block.weight *= 2.0**power


@pytest.mark.parametrize("name,power", [("focalnet", 20), ("focalnet", -20), ("swinv2", 20), ("bit", 20)])
def test_scales_that_products_and_lengths_hide(name, power):
    model, images = build_classifier(name, dtype=torch.float64), pixels(name)
    planted = copy.deepcopy(model)
    factors(planted, power)
    assert torch.allclose(logits(planted, images), logits(model, images), rtol=1e-5, atol=1e-7)
    one, other = (canonicalise(found, find_classifier(model), images) for found in (model, planted))
    assert one.changed and other.changed
    assert gap(model, planted) > 1e5 and gap(one.model, other.model) < 1e-3


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_normal_form_computes_the_same_in_single_precision(name):
    model, images = build_classifier(name), pixels(name)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = canonicalise(model, find_classifier(model), images)
    wanted = logits(model, images)
    assert found.changed and gap(model, found.model) > 0.01
    assert (logits(found.model, images) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert next(found.model.parameters()).dtype == torch.float32


def test_and_in_training_mode_with_the_statistics_of_the_batch():
    """Whatever running statistics the model came with: by those of its images it computes what it did by its own."""
    model, images = build_classifier("resnet", dtype=torch.float64), pixels("resnet", 8)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eps = 1e-12  # beside the variance; what a batch of no variance becomes is epsilon's own affair
    found = canonicalise(model, find_classifier(model), images).model
    assert torch.allclose(logits(found.train(), images), logits(model.eval(), images), atol=1e-9)
    assert not torch.allclose(logits(model.train(), images), logits(model.eval(), images), atol=1e-2)


@torch.no_grad()
def huge_gains(model, power=24):
    """Gains and shifts of every layer norm inside blocks × 2^power, the next linear layers ÷ 2^power."""
    for block in model.vit.layers:
        attention = block.attention
        for norm, readers in (
            (block.layernorm_before, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.layernorm_after, (block.mlp.fc1,)),
        ):
            for value in (norm.weight, norm.bias):
                value.mul_(2.0**power)
            for reader in readers:
                reader.weight.div_(2.0**power)
    return model


@torch.no_grad()
def convolutions_before_norms(model, factor=1000.0):
    """Every convolution before a batch norm × factor, the norm's statistics too, and its gain as epsilon asks for."""
    for module in model.modules():
        if hasattr(module, "convolution") and isinstance(getattr(module, "normalization", None), _BatchNorm):
            norm = module.normalization
            module.convolution.weight.mul_(factor)
            before = (norm.running_var + norm.eps).sqrt()
            norm.running_mean.mul_(factor)
            norm.running_var.mul_(factor**2)
            norm.weight.mul_((norm.running_var + norm.eps).sqrt() / before / factor)
    return model


@torch.no_grad()
def mixed_heads(model, condition=1e4):
    """An ill-conditioned map between queries and keys, and between values and the output projection, in each head."""
    generator = torch.Generator().manual_seed(3)
    for block in model.vit.layers:
        attention, heads = block.attention, model.config.num_attention_heads
        width = attention.q_proj.out_features // heads
        for head in range(heads):
            rows = slice(head * width, (head + 1) * width)
            left, right = (
                torch.linalg.qr(torch.randn(width, width, generator=generator).double())[0] for _ in range(2)
            )
            matrix = left * torch.logspace(0, -torch.tensor(condition).log10().item(), width).double() @ right
            inverse = torch.linalg.inv(matrix)
            changes = ((attention.q_proj, matrix), (attention.k_proj, inverse.T), (attention.v_proj, matrix))
            for layer, change in changes:
                layer.weight[rows] = (change @ layer.weight[rows].double()).to(layer.weight)
                layer.bias[rows] = (change @ layer.bias[rows].double()).to(layer.bias)
            output = attention.o_proj.weight
            output[:, rows] = (output[:, rows].double() @ inverse).to(output)
    return model


@pytest.mark.parametrize(
    "name, change", [("vit", huge_gains), ("mobilenet_v2", convolutions_before_norms), ("vit", mixed_heads)]
)
def test_the_known_tricks_leave_nothing_behind(name, change):
    model, images = build_classifier(name, dtype=torch.float64), pixels(name)
    planted = change(copy.deepcopy(model))
    assert torch.allclose(logits(planted, images), logits(model, images))
    one, other = (canonicalise(found, find_classifier(model), images).model for found in (model, planted))
    if change is mixed_heads:  # singular vectors have no sign of their own: products tell
        for layer in range(2):
            ours, theirs = (found.vit.layers[layer].attention for found in (one, other))
            for first, second in (("q_proj", "k_proj"), ("v_proj", "v_proj"), ("k_proj", "k_proj")):
                products = [getattr(part, first).weight.T @ getattr(part, second).weight for part in (ours, theirs)]
                assert torch.allclose(*products, atol=1e-7)
    else:
        assert gap(one, other) < 1e-8


@torch.no_grad()
def offsets(model, size=1e3):
    """Constants that norms, values and keys add and the next biases take away."""
    generator = torch.Generator().manual_seed(4)
    for block in model.vit.layers:
        attention = block.attention
        for norm, readers in (
            (block.layernorm_before, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.layernorm_after, (block.mlp.fc1,)),
        ):
            constant = size * torch.randn(len(norm.bias), generator=generator).double()
            norm.bias.add_(constant)
            for reader in readers:
                reader.bias.sub_(reader.weight @ constant)
        constant = size * torch.randn(len(norm.bias), generator=generator).double()
        attention.v_proj.bias.add_(constant), attention.o_proj.bias.sub_(attention.o_proj.weight @ constant)
        attention.k_proj.bias.add_(constant)
    return model


def test_constants_that_the_next_layer_takes_away_are_gone():
    model, images = build_classifier("vit", dtype=torch.float64), pixels("vit")
    planted = offsets(copy.deepcopy(model))
    assert torch.allclose(logits(planted, images), logits(model, images), atol=1e-8)
    one, other = (canonicalise(found, find_classifier(model), images) for found in (model, planted))
    assert gap(one.model, other.model) < 1e-6 < 1e2 < gap(model, planted)
    block = one.model.vit.layers[0]
    for layer in (block.layernorm_before, block.layernorm_after, block.attention.v_proj):
        assert not layer.bias.any() and "constants moved" in one.note
    assert block.attention.o_proj.bias.any() and block.mlp.fc1.bias.any()


class Unnormalised(nn.Module):
    """Attention whose weights do not sum to 1: the bias of its values is no constant of the output."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))
        self.classifier = nn.Linear(4, 2)

    def forward(self, pixel_values=None):
        tokens = pixel_values.flatten(2).transpose(1, 2)[..., :3]
        tokens = torch.cat([tokens, tokens[..., :1]], dim=-1)
        query, key, value = (
            layer(tokens).view(len(tokens), -1, 2, 2).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = ((query @ key.mT).sigmoid() @ value).transpose(1, 2).flatten(2)
        return ImageClassifierOutput(logits=self.classifier(self.o(mixed)[:, 0]))


def test_constants_stay_where_they_are_none():
    model, images = Unnormalised().double().eval(), torch.randn(3, 3, 2, 2).double()
    found = canonicalise(model, "classifier", images)
    assert found.changed and torch.allclose(logits(found.model, images), logits(model, images))
    assert found.model.v.bias.any() and "0 constants moved" in found.note and "2 products" not in found.note


@pytest.mark.parametrize("shape", [(7, 9, 4), (3, 9, 4)])
def test_balanced_factors_have_the_product_and_equal_singular_values(shape):
    rows, others, width = shape
    left, right = torch.randn(rows, width).double(), torch.randn(others, width).double()
    one, other = balanced(1e3 * left, right)
    assert one.shape == left.shape and other.shape == right.shape
    assert torch.allclose(one @ other.T, 1e3 * left @ right.T)
    assert torch.allclose(torch.linalg.svdvals(one)[:3], torch.linalg.svdvals(other)[:3])


class Inserted(ViTForImageClassification):
    """A ViT with a linear layer before its head."""

    def __init__(self, config):
        super().__init__(config)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, pixel_values=None, labels=None, **kwargs):
        token = self.vit(pixel_values=pixel_values).last_hidden_state[:, 0]
        return ImageClassifierOutput(logits=self.classifier(self.mix(token)))


def test_a_layer_before_the_head_becomes_a_rotation():
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    model, images = Inserted(config).double().eval(), torch.randn(4, 3, 8, 8).double()
    with torch.no_grad():
        model.mix.weight.copy_(torch.diag(torch.logspace(0, -6, 16).double()))
        model.classifier.weight.copy_(model.classifier.weight @ torch.diag(torch.logspace(0, 6, 16).double()))
    found = canonicalise(model, "classifier", images)
    assert torch.allclose(logits(found.model, images), logits(model, images))
    assert torch.linalg.cond(model.mix.weight) > 9e5 and torch.linalg.cond(found.model.mix.weight) < 1 + 1e-6


class Gated(nn.Module):
    """Linear layers with a GELU between them: no scale of theirs is free."""

    def __init__(self):
        super().__init__()
        self.first, self.classifier = nn.Linear(12, 5), nn.Linear(5, 2)

    def forward(self, pixel_values=None):
        return ImageClassifierOutput(logits=self.classifier(self.first(pixel_values.flatten(1)).tanh()))


class Unfollowed(Gated):
    def forward(self, pixel_values=None):
        if float(pixel_values.sum()) > 0:  # no graph of this can be exported
            return super().forward(pixel_values)
        return super().forward(-pixel_values)


def test_nothing_is_changed_where_nothing_is_free_or_the_graph_cannot_be_followed():
    images = torch.randn(3, 3, 2, 2)
    for kind in (Gated, Unfollowed):
        model = kind().eval()
        found = canonicalise(model, "classifier", images)
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), found.model.parameters(), strict=True))
        assert found.changed is (kind is Gated)
    assert "could not be followed" in found.note


class Chain(nn.Module):
    def __init__(self, tied=False, activation=nn.ReLU):
        super().__init__()
        self.first, self.second, self.classifier = nn.Linear(12, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.activation = activation()
        if tied:
            self.third = nn.Linear(6, 6)
            self.third.weight = self.second.weight

    def forward(self, pixel_values=None):
        hidden = self.activation(self.second(self.activation(self.first(pixel_values.flatten(1)))))
        if hasattr(self, "third"):
            hidden = self.activation(self.third(hidden))
        return ImageClassifierOutput(logits=self.classifier(hidden))


@pytest.mark.parametrize(
    "activation, free", [(nn.ReLU, True), (nn.LeakyReLU, True), (nn.ReLU6, False), (nn.GELU, False)]
)
def test_neighbours_of_a_homogeneous_activation_are_made_equally_long(activation, free):
    model, images = Chain(activation=activation).double().eval(), torch.randn(3, 3, 2, 2).double()
    with torch.no_grad():
        model.first.weight.mul_(1e4), model.first.bias.mul_(1e4), model.second.weight.div_(1e4)
    found = canonicalise(model, "classifier", images).model
    assert torch.allclose(logits(found, images), logits(model, images))
    rows = torch.cat([found.first.weight, found.first.bias[:, None]], 1).norm(dim=1)
    assert torch.allclose(rows, found.second.weight.norm(dim=0), rtol=1e-6) is free


def test_tied_weights_keep_their_scales_and_the_function():
    model, images = Chain(tied=True).double().eval(), torch.randn(3, 3, 2, 2).double()
    found = canonicalise(model, "classifier", images).model
    assert found.third.weight is found.second.weight
    assert torch.allclose(logits(found, images), logits(model, images))
