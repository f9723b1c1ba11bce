"""What layer norms take away: means that are written, and what is read of a sum that is zero, leave nothing behind."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_canonical import gap, logits, pixels
from vision_builders import build_classifier

from hf_immunize.attacks.vision.canonical import canonicalise
from hf_immunize.attacks.vision.canonical.moves import Move, attempt
from hf_immunize.features import find_classifier

_VIT = r"projection\.|o_proj\.|fc2\.|_token$|position_embeddings$"
WRITERS = {
    "vit": (_VIT, "$^"),
    "deit": (_VIT, "$^"),
    "dinov2": (_VIT, "$^"),
    "beit": (_VIT, "$^"),
    # neighbours are normalised as one before the second stage: constants alone are free in the first
    "swin": (
        r"projection\.|reduction\.|layers\.1\..*(o_proj|fc2)\.",
        r"embeddings\.norm\.bias|layers\.0\..*(o_proj|fc2)\.bias",
    ),
    "convnext": (r"patch_embeddings\.", r"dwconv\.bias"),
}  # fmt: skip
"""Per architecture: what may get anything in all channels alike, and which biases may get a constant."""


def factor(named, name):
    """LayerScale behind a map, where there is one."""
    block = re.match(r".*layers?\.\d+\.", name)
    number = 1 if "o_proj" in name else 2
    scales = [f"{block[0]}{scale}" for scale in (f"layer_scale{number}.lambda1", f"lambda_{number}")] if block else []
    return next((named[scale] for scale in scales if scale in named), torch.ones(()))


@torch.no_grad()
def with_means(model, name, size=1e3):
    """All that writes a stream gets large numbers, the same in every channel."""
    draws, named = torch.Generator().manual_seed(3), dict(model.named_parameters())
    whole, constants = WRITERS[name]
    planted = 0
    for found, value in named.items():
        if not re.search(whole, found) and not re.search(constants, found) or "mask_token" in found:
            continue
        table, channels = value.dim() == 3, -1 if value.dim() == 3 else 0
        shape = list(value.shape)
        shape[channels] = 1
        back = factor(named, found)
        alike = size * torch.randn(shape, generator=draws, dtype=torch.float64).to(value)
        value.add_(alike if table else alike / back.view(-1, *(1,) * (value.dim() - 1)))
        planted += 1
    assert planted > 2
    return model


@torch.no_grad()
def with_sums(model, size=1e3):
    """All that reads a layer norm of a ViT takes a large multiple of a sum that is zero."""
    draws = torch.Generator().manual_seed(4)
    for block in model.vit.layers:
        attention = block.attention
        for norm, readers in (
            (block.layernorm_before, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.layernorm_after, (block.mlp.fc1,)),
        ):
            for reader in readers:
                by = size * torch.randn(len(reader.weight), generator=draws, dtype=torch.float64).to(reader.weight)
                reader.weight.add_(by[:, None] / norm.weight)
                reader.bias.sub_(by * (norm.bias / norm.weight).sum())
    return model


@pytest.mark.parametrize("name", WRITERS)
def test_means_that_layer_norms_take_away_leave_nothing_behind(name):
    model, images = build_classifier(name, dtype=torch.float64), pixels(name)
    planted = with_means(copy.deepcopy(model), name)
    assert torch.allclose(logits(planted, images), logits(model, images), rtol=1e-7, atol=1e-9)
    one, other = (canonicalise(found, find_classifier(model), images) for found in (model, planted))
    assert one.changed and other.changed and gap(one.model, other.model) < 1e-6 < 100 < gap(model, planted)


def test_what_reads_a_sum_of_zero_leaves_nothing_behind():
    model, images = build_classifier("vit", dtype=torch.float64), pixels("vit")
    planted = with_sums(copy.deepcopy(model))
    assert torch.allclose(logits(planted, images), logits(model, images), rtol=1e-7, atol=1e-9)
    one, other = (canonicalise(found, find_classifier(model), images) for found in (model, planted))
    assert gap(one.model, other.model) < 1e-6 < 100 < gap(model, planted)
    for block in other.model.vit.layers:
        for norm, reader in ((block.layernorm_before, block.attention.q_proj), (block.layernorm_after, block.mlp.fc1)):
            assert torch.allclose(reader.weight @ norm.weight, torch.zeros(()).double(), atol=1e-9)


class Block(nn.Module):
    """A stream with a norm, a map that writes it, and perhaps one more reader."""

    def __init__(self, norm=None, overheard=None):
        super().__init__()
        self.patches, self.norm, self.out = nn.Linear(12, 6), norm or nn.LayerNorm(6), nn.Linear(6, 6)
        self.last, self.classifier = copy.deepcopy(self.norm), nn.Linear(6, 2)
        self.side, self.overheard = nn.Linear(6, 6), overheard

    def forward(self, pixel_values=None):
        patches = pixel_values.reshape(len(pixel_values), 3, 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5)
        stream = self.patches(patches.flatten(3).flatten(1, 2))
        grouped = isinstance(self.norm, nn.GroupNorm)
        normalise = lambda norm, found: norm(found.transpose(1, 2)).transpose(1, 2) if grouped else norm(found)  # noqa: E731
        stream = stream + self.out(normalise(self.norm, stream))
        found = normalise(self.last, stream)
        if self.overheard == "linear":
            found = found + self.side(stream)
        if self.overheard == "gate":
            found = found * stream.mean(dim=-1, keepdim=True).sigmoid()
        return ImageClassifierOutput(logits=self.classifier(found.mean(dim=1)))


@pytest.mark.parametrize("overheard", ["linear", "gate"])
def test_a_stream_that_something_else_reads_keeps_its_mean(overheard):
    torch.manual_seed(0)
    model, images = Block(overheard=overheard).double().eval(), torch.randn(4, 3, 4, 4).double()
    found = canonicalise(model, "classifier", images)
    assert found.changed and " 0 streams and 1 readers centred" in found.note
    assert torch.allclose(logits(found.model, images), logits(model, images))
    assert found.model.out.weight.mean(dim=0).abs().max() > 1e-3 < found.model.out.bias.mean().abs()
    heard = canonicalise(Block().double().eval(), "classifier", images)
    assert " 1 streams" in heard.note and heard.model.out.weight.mean(dim=0).abs().max() < 1e-12


def test_where_a_norm_takes_tokens_together_constants_alone_are_centred():
    torch.manual_seed(0)
    model, images = Block(nn.GroupNorm(1, 6)).double().eval(), torch.randn(4, 3, 4, 4).double()
    found = canonicalise(model, "classifier", images)
    assert found.changed and found.error < 1e-12 and " 1 streams and 0 readers centred" in found.note
    assert found.model.out.weight.mean(dim=0).abs().max() > 1e-3 and found.model.out.bias.mean().abs() < 1e-12


def test_moves_that_do_not_hold_are_put_back_or_made_smaller():
    """Of eight numbers all become 1 but the two that may not; one of those may become 2."""
    named = {str(place): torch.zeros(()) for place in range(8)}
    to = lambda place, value, otherwise=None: Move(  # noqa: E731
        (str(place),), lambda named: named[str(place)].fill_(value), otherwise)
    moves = [to(place, 1.0, to(place, 2.0) if place == 3 else None) for place in range(8)]
    tries = []

    def holds():
        tries.append([float(value) for value in named.values()])
        return named["3"] != 1 and named["6"] != 1

    assert attempt(moves, named, holds) == 7
    assert [float(value) for value in named.values()] == [1, 1, 1, 2, 1, 1, 0, 1] and len(tries) < 15
