"""Two processes, with whole weights (DDP) or split ones (FSDP2), and one give the same gradient."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from launching import run_script
from safetensors.torch import load_file

from hf_immunize.training.core.distributed import gather_rows, mean_over_ranks, world

CASES = 44
SCRIPT = Path(__file__).parent / "global_step.py"


def run(output: Path, processes: int) -> dict[str, torch.Tensor]:
    run_script(SCRIPT, str(output), str(processes), processes=processes)
    return load_file(output)


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    return {processes: run(folder / f"{processes}.safetensors", processes) for processes in (1, 2)}


def test_every_objective_accumulation_and_weighting_gives_the_same_gradient(gradients):
    one, two = gradients[1], gradients[2]
    assert one.keys() == two.keys()
    error, size = defaultdict(float), defaultdict(float)
    for name, truth in one.items():
        case = name.rsplit("/", 1)[0]
        error[case] += float((two[name] - truth).square().sum())
        size[case] += float(truth.square().sum())
    assert len(size) == CASES
    for case in size:
        assert size[case] > 0
        assert (error[case] / size[case]) ** 0.5 <= 1e-8, case


def test_each_objective_really_changes_the_gradient(gradients):
    cases = defaultdict(list)
    for name, value in gradients[1].items():
        cases[name.rsplit("/", 1)[0]].append(value.flatten())
    values = [torch.cat(parts) for parts in cases.values()]
    assert len(values) == CASES
    for i, first in enumerate(values):
        for second in values[i + 1 :]:
            assert not torch.allclose(first, second, rtol=1e-9, atol=0)


def test_without_a_process_group_gathering_changes_nothing():
    rows = torch.arange(6.0).reshape(3, 2).requires_grad_()
    gathered, mine = gather_rows(rows)
    assert torch.equal(gathered, rows.detach()) and not gathered.requires_grad
    assert mine.tolist() == [0, 1, 2]
    assert world() == (0, 1)
    assert float(mean_over_ranks(torch.tensor(3.0))) == 3.0


def _uneven(rank: int, meeting: str, queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    rows = torch.tensor([[10.0 * rank + i] for i in range(3 - rank)])
    gathered, mine = gather_rows(rows)
    queue.put((rank, gathered.flatten().tolist(), mine.tolist()))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_with_different_numbers_of_rows_interleave_in_order(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_uneven, args=(rank, str(tmp_path / "meeting"), queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = dict((rank, (rows, mine)) for rank, rows, mine in (queue.get(timeout=120) for _ in workers))
    for worker in workers:
        worker.join(60)
    assert found[0] == ([0.0, 10.0, 1.0, 11.0, 2.0], [0, 2, 4])
    assert found[1] == ([0.0, 10.0, 1.0, 11.0, 2.0], [1, 3])
