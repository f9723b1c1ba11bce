"""One collective brings all ranks' rows of all tensors, bit for bit; sums and means take one as well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import run_script
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "exchange_run.py"


RANKS = 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found."""
    output = tmp_path_factory.mktemp("exchange") / "found"
    run_script(SCRIPT, str(output), processes=RANKS)
    return [load_file(f"{output}.{rank}") for rank in range(RANKS)]


def by_hand(size: int, counts: list[int], place: int) -> torch.Tensor:
    """Rows of all ranks in turn, written out one by one."""
    numbers = [(row, owner) for row in range(max(counts)) for owner in range(size) if row < counts[owner]]
    said = torch.tensor([7 * size * row + 7 * owner for row, owner in numbers], dtype=torch.float64)
    return [
        lambda: said[:, None] + torch.arange(3).double() / 3,
        lambda: (said[:, None, None] + torch.ones(2, 2)).bfloat16(),
        lambda: said.long() + 2**53 + 1,
        lambda: said[:, None].float() / 3,
        lambda: said % 2 == 0,
    ][place]()


def test_rows_of_every_dtype_arrive_bit_for_bit_and_in_turn(ranks):
    size = len(ranks)
    for step, base in enumerate((3, 3, 2, 5, 4)):
        for place in range(5):
            counts = [[base, base, base + rank, base - rank, 2 * rank][place] for rank in range(size)]
            truth = by_hand(size, counts, place)
            owners = torch.tensor([o for row in range(max(counts)) for o in range(size) if row < counts[o]])
            for rank, found in enumerate(ranks):
                rows, mine = found[f"{step}.{place}.rows"], found[f"{step}.{place}.mine"]
                assert rows.dtype == truth.dtype and torch.equal(rows, truth)
                assert torch.equal(mine, (owners == rank).nonzero().squeeze(1))


def test_one_collective_unless_more_room_is_needed_than_ever(ranks):
    for found in ranks:
        gathers = [found[f"calls.{step}"].tolist() for step in range(5)]
        assert gathers == [[2, 0, 0], [1, 0, 0], [1, 0, 0], [2, 0, 0], [1, 0, 0]]


def test_gathering_one_tensor(ranks):
    counts = [3 - rank for rank in range(len(ranks))]
    truth = [10.0 * o + row for row in range(3) for o in range(len(ranks)) if row < counts[o]]
    for found in ranks:
        assert found["alone.rows"].flatten().tolist() == truth


def test_sums_and_means_take_a_call_for_each_dtype(ranks):
    size = len(ranks)
    for found in ranks:
        assert torch.equal(found["sum.0"], torch.full((2, 3), size * (size + 1) / 2))
        assert torch.equal(found["sum.1"], torch.full((4,), 2.0**size - 1, dtype=torch.float64))
        assert torch.equal(found["sum.2"], torch.ones(5) * size * (size - 1) / 2)
        assert found["calls.sum"].tolist() == [0, 0, 2]
        assert torch.equal(found["mean.0"], torch.full((2, 3), (size + 1) / 2))
        assert float(found["mean.1"]) == 2.0 * (size - 1)
        assert found["calls.mean"].tolist() == [0, 0, 1]


def test_scalars_of_a_step_are_averaged_by_one_call(ranks):
    for found in ranks:
        middle = (len(ranks) - 1) / 2
        assert found["meter"].tolist() == [middle + 0.5, 10.0 * middle]
        assert found["calls.meter"].tolist() == [0, 0, 1]
