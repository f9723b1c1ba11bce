"""Layouts by hand, and finding them in small networks that hold their images in other places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_immunize.errors import CaptureError, ConfigError
from hf_immunize.features import (
    RowLayout,
    capture_inputs,
    extract_features,
    find_layouts,
    parse_layouts,
    pool_rows,
    unmoved_inputs,
)

WIDTH = 4
NUMBERS = torch.arange(2 * 3 * 4 * 5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("pattern", "shape", "images", "by_hand"),
    [
        ("n d", (6, 4), 6, lambda x: x),
        ("n t d", (6, 5, 4), 6, lambda x: x.mean(1)),
        ("n d h w", (6, 4, 5, 1), 6, lambda x: x.mean((2, 3))),
        ("n h w d", (6, 5, 1, 4), 6, lambda x: x.mean((1, 2))),
        ("t n d", (5, 6, 4), 6, lambda x: x.mean(0)),
        ("n 0 d", (6, 5, 4), 6, lambda x: x[:, 0]),
        ("(n k) t d", (6, 5, 4), 2, lambda x: torch.stack([x[:3].mean((0, 1)), x[3:].mean((0, 1))])),
        ("(k n) t d", (6, 5, 4), 2, lambda x: torch.stack([x[::2].mean((0, 1)), x[1::2].mean((0, 1))])),
        ("(n k) d", (30, 4), 6, lambda x: x.reshape(6, 5, 4).mean(1)),
        ("(n k) 0 d", (6, 5, 4), 2, lambda x: torch.stack([x[:3, 0].mean(0), x[3:, 0].mean(0)])),
        ("(n k) h w d", (6, 5, 1, 4), 3, lambda x: x.reshape(3, 10, 4).mean(1)),
        ("(2 n k) t d", (12, 5, 2), 3, lambda x: x.reshape(2, 3, 2, 5, 2).mean((0, 2, 3))),
        ("d n", (4, 6), 6, lambda x: x.T),
    ],
)  # fmt: skip
def test_a_layout_means_what_it_says(pattern, shape, images, by_hand):
    value, layout = NUMBERS[: torch.Size(shape).numel()].reshape(shape).requires_grad_(), RowLayout(pattern)
    rows = layout.rows(value, images)
    assert rows.shape[0] == images and torch.allclose(rows, by_hand(value))
    weights = torch.randn(rows.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, truth = (torch.autograd.grad((found * weights).sum(), value)[0] for found in (rows, by_hand(value)))
    assert torch.allclose(ours, truth)
    # A shift of all that a row is the mean of moves the row by itself: its gradient is that of the row.
    assert torch.allclose(layout.shift(ours, images), weights)
    count = layout.positions(value, images)
    assert torch.allclose(layout.by_image(value, images).sum(1) / count, rows)


@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4), (6, 4, 5, 1)])
def test_plain_pooling_keeps_its_bits(shape):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    old = value if len(shape) == 2 else value.mean(dim=1) if len(shape) == 3 else value.mean(dim=(2, 3))
    assert torch.equal(pool_rows(value), old)


@pytest.mark.parametrize(
    "pattern", ["", "n t", "t d", "n n d", "n (t d)", "(n k j) d", "n (t u) d", "n-t-d", "n t d d"]
)
def test_a_pattern_that_is_no_layout_is_refused(pattern):
    with pytest.raises(CaptureError, match="expected .*axes|expected brackets"):
        RowLayout(pattern)


@pytest.mark.parametrize(
    ("pattern", "shape", "images"),
    [("n t d", (12, 4), 12), ("n t d", (48, 16, 4), 12), ("(n k) t d", (10, 2, 4), 4), ("n 7 d", (3, 5, 4), 3),
     ("(2 n) d", (12, 4), 5)],
)  # fmt: skip
def test_an_input_that_does_not_fit_is_refused_with_its_shape(pattern, shape, images):
    with pytest.raises(CaptureError, match=rf"'{pattern}'".replace("(", r"\(").replace(")", r"\)") + r".*got shape \("):
        RowLayout(pattern).rows(torch.zeros(shape), images)


def test_options_name_sites_by_their_ends():
    sites = ["vit.layers.0.q_proj", "vit.layers.1.q_proj", "classifier"]
    found = parse_layouts("q_proj=(n k) t d, classifier = n d", sites)
    assert [layout and layout.pattern for layout in found.values()] == ["(n k) t d", "(n k) t d", "n d"]
    assert parse_layouts(None, sites) == dict.fromkeys(sites)
    with pytest.raises(ConfigError, match="expected site_layouts like 'classifier=n t d' .*got 'fc=n d'"):
        parse_layouts("fc=n d", sites)
    with pytest.raises(ConfigError, match="site_layouts: expected axes like"):
        parse_layouts("classifier=n t", sites)


class Tokens(nn.Module):
    """Tokens of 4×4 images, one for each row of pixels, handed to ``layer`` after ``arrange`` moved them."""

    def __init__(self, arrange, layer: nn.Module | None = None):
        super().__init__()
        self.arrange = arrange
        self.layer = layer or nn.Linear(WIDTH, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.layer(self.arrange(pixel_values.flatten(1, 2)))  # N × 12 × 4


def pixels(rows: int = 5) -> Tensor:
    return torch.randn(rows, 3, 4, 4, generator=torch.Generator().manual_seed(1))


CONSTANT = torch.ones(2, WIDTH)
ARRANGED = {
    "n t d": lambda x: x,
    "n h w d": lambda x: x.unflatten(1, (3, 4)),
    "t n d": lambda x: x.transpose(0, 1),
    "(n k) t d": lambda x: x.unflatten(1, (4, 3)).flatten(0, 1),
    "(k n) t d": lambda x: x.unflatten(1, (4, 3)).transpose(0, 1).flatten(0, 1),
    "(2 n k) t d": lambda x: x.reshape(-1, 2, 3, 2, WIDTH).transpose(0, 1).flatten(0, 2),
    "(n k) d": lambda x: x.flatten(0, 1),
    "(k n) d": lambda x: x.transpose(0, 1).flatten(0, 1),
    "(n k) h w d": lambda x: x.unflatten(1, (2, 3, 2)).flatten(0, 1),
    "h n w d": lambda x: x.unflatten(1, (3, 4)).transpose(0, 1),
    "t (n k) d": lambda x: x.unflatten(1, (3, 4)).transpose(1, 2).flatten(0, 1).transpose(0, 1),
    "n d": lambda x: x[:, 0],
}


@pytest.mark.parametrize("images", [1, 2, 3, 4, 5, 12])
@pytest.mark.parametrize("pattern", ARRANGED)
def test_the_axis_of_the_images_is_found_and_rows_are_those_of_single_images(pattern, images):
    model, inputs = Tokens(ARRANGED[pattern]).train(), pixels(images)
    layouts = find_layouts(model, ["layer"], {"pixel_values": inputs[:1]})
    assert layouts["layer"].pattern == pattern and model.training
    with torch.no_grad(), capture_inputs(model, layouts) as caught:
        model(pixel_values=inputs)
    whole = inputs.flatten(1, 2)
    assert torch.allclose(caught["layer"], whole[:, 0] if pattern == "n d" else whole.mean(1), atol=1e-6)


def test_as_many_tokens_as_images_are_not_taken_for_images():
    """3 tokens under the 3 images of the trial, and then under the 3 of the forward."""
    model, inputs = Tokens(lambda x: x[:, :3].transpose(0, 1)), pixels(3)
    with torch.no_grad(), capture_inputs(model, find_layouts(model, ["layer"], {"pixel_values": inputs})) as caught:
        model(pixel_values=inputs)
    assert torch.allclose(caught["layer"], inputs.flatten(1, 2)[:, :3].mean(1), atol=1e-6)


def test_attention_that_wants_tokens_first():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(WIDTH, 2)  # batch_first=False
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, pixel_values: Tensor) -> Tensor:
            tokens = pixel_values.flatten(1, 2).transpose(0, 1)
            return self.head(self.inner(tokens, tokens, tokens)[0])

    model, inputs = Attention(), pixels(12)
    rows = extract_features(model, [{"pixel_values": inputs}], ["inner", "head"])
    assert rows["inner"].shape == rows["head"].shape == (12, WIDTH)
    assert torch.allclose(rows["inner"], inputs.flatten(1, 2).mean(1), atol=1e-6)


class Normalized(nn.Module):
    """Batch statistics in evaluation mode: every row depends on every image."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, track_running_stats=False)
        self.layer = nn.Linear(WIDTH, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.layer(self.norm(pixel_values.flatten(1, 2).mean(1)))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Normalized(), r"\(3, 4\) for 3 images, of which no axis keeps the images apart"),
        (Tokens(lambda x: x.mean(0)), r"\(12, 4\) for 3 images, of which no axis"),
        (Tokens(lambda x: x.mean(0, keepdim=True)), r"\(1, 12, 4\) for 3 images, of which no axis"),
        (Tokens(lambda x: x.flatten(0, 1)[1:]), r"\(35, 4\) for 3 images, of which no axis"),
        (Tokens(lambda x: CONSTANT.expand(len(x), -1, -1)), r"\(3, 2, 4\) for 3 images, which not every image changes"),
        (Tokens(lambda x: x.mean(0).reshape(3, 4, 4), nn.Conv2d(3, 2, 1)), r"\(3, 4, 4\).*not its 3 features"),
        (Tokens(lambda x: x.unflatten(1, (3, 4)), nn.Identity()), r"\(3, 3, 4, 4\).* no layer beside it shows"),
        (Tokens(lambda x: x.sum((1, 2)), nn.Identity()), r"\(3,\) for 3 images, which is not a batch of features"),
    ],
)
def test_what_has_no_row_per_image_is_refused_with_the_shape(model, told):
    if not any(True for _ in model.parameters()):
        model.weight = nn.Parameter(torch.ones(1))
    with pytest.raises(CaptureError, match=told):
        find_layouts(model, ["layer"], {"pixel_values": pixels()})
    with pytest.raises(CaptureError, match=told):
        extract_features(model, [{"pixel_values": pixels()}], ["layer"])


def test_a_layout_of_the_users_is_tried_as_well():
    inputs = {"pixel_values": pixels()}
    model = Tokens(lambda x: x)
    assert find_layouts(model, {"layer": "n 0 d"}, inputs)["layer"] == RowLayout("n 0 d")
    rows = extract_features(model, [inputs], {"layer": "n 0 d"})["layer"]
    assert torch.equal(rows, inputs["pixel_values"].flatten(1, 2)[:, 0])
    windows = Tokens(ARRANGED["(n k) t d"])
    for wrong in ("(k n) t d", "(2 n k) t d"):
        with pytest.raises(CaptureError, match=r"\(12, 3, 4\) for 3 images, of which '.*' does not keep"):
            find_layouts(windows, {"layer": wrong}, inputs)
    with pytest.raises(CaptureError, match=r"expected an input with axes 'n t d'.*got shape \(12, 3, 4\)"):
        find_layouts(windows, {"layer": "n t d"}, inputs)
    with pytest.raises(CaptureError, match="another axis for its features"):
        find_layouts(model, {"layer": "n d t"}, inputs)


def test_a_forward_with_another_number_of_rows_is_refused_while_it_runs():
    """What a layout was found for may change with the size of the images; a mismatch is never averaged away."""
    model = Tokens(ARRANGED["(n k) t d"])
    with capture_inputs(model, ["layer"]) as caught:
        model(pixel_values=pixels(5))
    with pytest.raises(CaptureError, match=r"'layer': .*of 5 images, got shape \(20, 3, 4\)"):
        caught["layer"]
    whole = Tokens(lambda x: x)
    with capture_inputs(whole, {"layer": "(n k) t d"}) as caught:
        whole.layer(torch.zeros(4, 3, WIDTH))  # not a forward of the model
    with pytest.raises(CaptureError, match="a forward of the whole model"):
        caught["layer"]


def test_a_blocks_axis_is_that_of_the_layers_that_meet_its_input():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.turned = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())  # N × H × W × D
            self.padded = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 2, 3))  # N × D × H × W
            self.norm = nn.Sequential(nn.Identity(), nn.GroupNorm(1, 2))

        def forward(self, pixel_values: Tensor) -> Tensor:
            self.turned(pixel_values)
            return self.norm(self.padded(pixel_values))

    names = ["turned", "turned.1", "padded", "norm", "norm.0"]
    found = find_layouts(Blocks(), names, {"pixel_values": pixels()})
    assert [layout.pattern for layout in found.values()] == ["n h w d"] * 2 + ["n d h w"] * 3


def test_looking_for_layouts_leaves_no_trace():
    model = nn.Sequential()
    model.body = Tokens(lambda x: x.unflatten(1, (3, 4)), nn.Conv2d(3, 2, 1))
    model.norm = nn.BatchNorm2d(2)
    model.norm.eval()
    model.forward = lambda pixel_values: model.norm(model.body(pixel_values))
    model.body.train()
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.random.get_rng_state()
    find_layouts(model, ["norm"], {"pixel_values": pixels()})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert model.body.training and not model.norm.training and not model.norm._forward_pre_hooks


def test_a_network_that_is_dead_at_birth_is_tried_with_the_statistics_of_a_batch():
    """In evaluation mode three small layers leave less of an image than a bias of 1 has digits for."""
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3))]
    model = nn.Sequential(*layers, nn.Flatten(2), nn.Linear(16, 2))
    for convolution, norm in zip(layers[::2], layers[1::2], strict=True):
        nn.init.constant_(convolution.weight, 1e-3)
        nn.init.ones_(norm.bias)
    stem = nn.Module()
    stem.inner, stem.forward = model, lambda pixel_values: model(pixel_values)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        assert len(model.eval()[:-1](pixels()).unique(dim=0)) == 1
    assert find_layouts(stem, ["inner.7"], {"pixel_values": pixels()})["inner.7"].pattern == "n t d"
    assert unmoved_inputs(stem, ["inner.7"], {"pixel_values": pixels()}) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
