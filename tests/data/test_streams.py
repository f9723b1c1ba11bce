"""The harmful stream is a pure function of (seed, step), whatever the number of processes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_immunize.data import RowBatchSampler, StepBatchSampler
from hf_immunize.errors import DataError

LABELS = [row % 4 for row in range(50)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(8, 40), st.integers(0, 10**4), st.sampled_from([1, 2, 3]))
def test_ranks_share_out_the_one_global_batch(seed, rows, step, world):
    whole = StepBatchSampler(LABELS, rows, seed=seed).global_batch(step).tolist()
    parts = [
        next(iter(StepBatchSampler(LABELS, rows, seed=seed, start=step, rank=rank, world_size=world)))
        for rank in range(world)
    ]
    assert len(whole) == rows
    for rank, part in enumerate(parts):
        assert part == whole[rank::world]


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(0, 10**4), st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 2]))
def test_a_steps_batch_is_drawn_as_a_whole_and_cut(seed, step, parts, world):
    for made in (lambda **cut: StepBatchSampler(LABELS, 24, seed=seed, **cut),
                 lambda **cut: RowBatchSampler(50, 24, seed=seed, **cut)):
        whole = made().global_batch(step).tolist()
        shares = [list(itertools.islice(made(start=step * parts, parts=parts, rank=rank, world_size=world), parts + 1))
                  for rank in range(world)]
        size = 24 // parts
        for part in range(parts):
            cut = whole[part * size : (part + 1) * size]
            assert [shares[rank][part] for rank in range(world)] == [cut[rank::world] for rank in range(world)]
        assert shares[0][parts] == made().global_batch(step + 1).tolist()[:size][0::world]


def test_rows_that_cannot_be_cut_evenly_are_refused():
    with pytest.raises(DataError, match="can be cut into 5, got 12 rows"):
        StepBatchSampler(LABELS, 12, seed=0, parts=5)


def test_starting_later_continues_the_same_stream():
    from_zero = list(itertools.islice(StepBatchSampler(LABELS, 12, seed=3), 6))
    assert list(itertools.islice(StepBatchSampler(LABELS, 12, seed=3, start=4), 2)) == from_zero[4:]
    assert len({tuple(batch) for batch in from_zero}) == 6


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 4), st.integers(8, 40), st.integers(0, 999))
def test_classes_are_even_and_rows_distinct(classes, rows, step):
    batch = StepBatchSampler(LABELS, rows, seed=0, classes_per_batch=classes).global_batch(step)
    counts = torch.bincount(torch.tensor(LABELS)[batch], minlength=4)
    present = counts[counts > 0]
    assert len(present) == classes
    assert int(present.max() - present.min()) <= 1
    if rows // classes < 12:
        assert len(set(batch.tolist())) == rows


@pytest.mark.parametrize(
    "labels,rows,message",
    [([], 8, "empty harmful_dataset"), ([1] * 9, 8, "at least two harmful classes"), (LABELS, 1, "got 1 rows")],
)
def test_impossible_streams_are_refused(labels, rows, message):
    with pytest.raises(DataError, match=message):
        StepBatchSampler(labels, rows, seed=0)
