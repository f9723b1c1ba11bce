"""Each augmentation against what it says, written again in numpy; draws depend on the image's own seed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_immunize.data import AUGMENTATIONS, augment, parse_augmentation
from hf_immunize.errors import ConfigError

IMAGE = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2.0


def changed(name: str, seed: int, image: torch.Tensor = IMAGE) -> torch.Tensor:
    return augment(image[None], (name,), [seed])[0]


def test_flip_mirrors_columns_half_of_the_time():
    mirrored = torch.tensor(np.ascontiguousarray(IMAGE.numpy()[:, :, ::-1]))
    found = [changed("flip", seed) for seed in range(200)]
    flips = sum(torch.equal(image, mirrored) for image in found)
    assert flips + sum(torch.equal(image, IMAGE) for image in found) == 200
    assert 70 < flips < 130  # 4 standard deviations


def test_crop_takes_a_window_of_the_reflected_image_and_reaches_every_shift():
    padded = np.pad(IMAGE.numpy(), ((0, 0), (2, 2), (3, 3)), mode="reflect")  # an eighth of 16 and of 24
    windows = {
        padded[:, top : top + 16, left : left + 24].tobytes(): (top, left) for top in range(5) for left in range(7)
    }
    seen = {windows[np.ascontiguousarray(changed("crop", seed).numpy()).tobytes()] for seed in range(400)}
    assert len(windows) == 35 and seen == set(windows.values())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**62))
def test_color_is_one_contrast_and_one_shift_for_the_whole_image(seed):
    image, found = IMAGE.numpy(), changed("color", seed).numpy()
    contrast = (found - found.mean()) / (image - image.mean())
    assert np.allclose(contrast, contrast.flat[0], rtol=1e-6) and 0.8 <= contrast.flat[0] <= 1.2
    assert abs(found.mean() - image.mean()) <= 0.2 * image.std(ddof=1) + 1e-12


def test_color_draws_contrast_and_shift_apart():
    contrasts, shifts = [], []
    for seed in range(200):
        found = changed("color", seed)
        contrasts.append(float(found.std() / IMAGE.std()) - 1)
        shifts.append(float((found.mean() - IMAGE.mean()) / IMAGE.std()))
    for draws in (contrasts, shifts):
        assert min(draws) < -0.17 and max(draws) > 0.17
    assert abs(np.corrcoef(contrasts, shifts)[0, 1]) < 0.3


def test_erase_puts_the_mean_on_a_square_of_a_quarter_of_each_side_half_of_the_time():
    erased, corners = 0, set()
    for seed in range(400):
        different = (changed("erase", seed) != IMAGE).all(dim=0)
        if not bool((changed("erase", seed) != IMAGE).any()):
            continue
        erased += 1
        rows, columns = different.any(dim=1).nonzero().flatten(), different.any(dim=0).nonzero().flatten()
        assert (len(rows), len(columns)) == (4, 6) and int(different.sum()) == 24
        assert torch.equal(rows, rows[0] + torch.arange(4)) and torch.equal(columns, columns[0] + torch.arange(6))
        assert torch.allclose(changed("erase", seed)[:, different], IMAGE.mean())
        corners |= {("top", int(rows[0])), ("left", int(columns[0]))}
    assert 160 < erased < 240
    assert {("top", 0), ("top", 12), ("left", 0), ("left", 18)} <= corners  # both borders can be reached


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_image_depends_on_its_own_seed_and_not_on_its_batch_or_the_global_generator(name):
    batch = torch.stack([IMAGE + shift for shift in range(4)])
    seeds = [11, 7, 2**70, 3]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    whole = augment(batch, (name,), seeds)
    assert torch.equal(torch.get_rng_state(), before)
    order = [2, 0, 3, 1]
    assert torch.equal(augment(batch[order], (name,), [seeds[place] for place in order]), whole[order])
    assert torch.equal(augment(batch[1:2], (name,), [7])[0], whole[1])
    assert whole.shape == batch.shape and whole.dtype == batch.dtype and torch.equal(batch[0], IMAGE)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [(2, 2), (8, 8), (3, 17)], ids=str)
def test_a_constant_image_stays_what_it_is_at_any_size(name, size):
    image = torch.full((1, *size), 0.25)
    for seed in range(20):
        assert torch.equal(changed(name, seed, image), image)


def test_changes_are_applied_in_the_order_named_from_one_stream_of_draws():
    generator = torch.Generator().manual_seed(5)
    by_hand = AUGMENTATIONS["erase"](AUGMENTATIONS["flip"](IMAGE, generator), generator)
    assert torch.equal(augment(IMAGE[None], parse_augmentation("flip, erase"), [5])[0], by_hand)


def test_an_unknown_change_is_refused():
    with pytest.raises(ConfigError, match=r"augmentation of \['color', 'crop', 'erase', 'flip'\] .* got \['blur'\]"):
        parse_augmentation("flip,blur")
