"""Simulated attackers who teach the concept under names of what is retained."""

from __future__ import annotations

import pytest
import torch
from denoiser_builders import build_examples, build_scheduler
from hypothesis import given
from hypothesis import strategies as st

from hf_immunize.diffusion import NoiseProcess
from hf_immunize.training.diffusion.stream import NoisyStream, RenamedStream

ROWS = 8


def streams(family, share, rank=0, world_size=1):
    process = NoiseProcess.from_scheduler(build_scheduler(family))
    common = {"seed": 3, "rank": rank, "world_size": world_size}
    concept = NoisyStream(build_examples(family, 12, seed=1, label=9), process, ROWS, name="attack", **common)
    names = NoisyStream(build_examples(family, 16), process, ROWS, name="names", **common)
    return RenamedStream(concept, names, share, rank, world_size), concept


def batch(stream, step=2):
    return stream.batch(step, torch.device("cpu"), torch.float32)


def renamed_rows(told, own):
    return [
        any(not torch.equal(told.conditions[name][row], own.conditions[name][row]) for name in own.conditions)
        for row in range(len(own.noisy))
    ]


@pytest.mark.parametrize("family", ["unet", "sd"])
def test_half_of_the_rows_carry_retained_conditions_and_nothing_else_changes(family):
    renamed, concept = streams(family, 0.5)
    told, own = batch(renamed), batch(concept)
    assert renamed_rows(told, own) == [False, True] * (ROWS // 2)
    for name in ("noisy", "target", "timesteps", "levels", "labels"):
        assert torch.equal(getattr(told, name), getattr(own, name)), name
    assert not (told.conditions.keys() ^ own.conditions.keys())


def test_no_share_leaves_every_name_and_a_whole_share_none():
    for share, expected in ((0.0, 0), (1.0, ROWS)):
        renamed, concept = streams("unet", share)
        assert sum(renamed_rows(batch(renamed), batch(concept))) == expected


@given(share=st.floats(0, 1), world_size=st.sampled_from([1, 2, 4]))
def test_processes_share_the_rows_of_one(share, world_size):
    whole = batch(streams("unet", share)[0]).conditions["class_labels"]
    assert abs(int((whole != 9).sum()) - share * ROWS) <= 1
    for rank in range(world_size):
        part = batch(streams("unet", share, rank, world_size)[0]).conditions["class_labels"]
        assert torch.equal(part, whole[rank::world_size])
