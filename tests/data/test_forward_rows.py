"""How many images go through a network at once."""

import torch
from torch import nn

from hf_immunize.data import PixelDataset, batches, forward_rows
from hf_immunize.features import prefer_channels_last


def test_large_images_come_in_small_batches_on_a_cpu():
    assert [forward_rows((3, side, side)) for side in (8, 128, 224, 2048)] == [512, 21, 6, 4]
    assert forward_rows((3, 224, 224), "cuda") == 256


def test_batches_hold_every_row_once_and_in_order():
    pixels = torch.arange(50.0)[:, None, None, None].expand(50, 3, 128, 128)
    rows = PixelDataset(pixels, torch.arange(50) % 2, ["a", "b"])
    parts = [part["pixel_values"][:, 0, 0, 0] for part in batches(rows)]
    assert [len(part) for part in parts] == [21, 21, 8] and torch.equal(torch.cat(parts), torch.arange(50.0))


def test_only_networks_with_batch_norm_change_their_layout_and_none_its_values():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    normed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = normed[0].weight.clone()
    assert prefer_channels_last(plain)[0].weight.is_contiguous()
    assert prefer_channels_last(normed)[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(normed[0].weight, before)
