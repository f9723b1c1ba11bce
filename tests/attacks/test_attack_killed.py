"""SIGKILL at many points of an exam: it resumes to the same runs, none lost, none doubled. Run with -m slow."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from test_sharing import RUNS, SEEDS, SETTINGS

from hf_immunize.attacks import ATTACKS, run_suite
from hf_immunize.attacks.core.sharing import Share
from hf_immunize.records import AttackTrace

pytestmark = pytest.mark.slow


def sit(context, folder):
    torch.set_num_threads(1)
    return run_suite(context, ATTACKS, list(SETTINGS), SEEDS, folder, SETTINGS, trials=3, tuning_seeds=1)


def curves(folder):
    return {path.name: AttackTrace.read(path).curve for path in folder.glob("traces/control/*.json")}


def killed(context, folder, traces, delay):
    """Start the exam in a process of its own and kill it once it has written ``traces`` files, ``delay`` s later."""
    child = multiprocessing.get_context("fork").Process(target=sit, args=(context, folder))
    child.start()
    until = time.monotonic() + 120
    while child.is_alive() and len(list(folder.glob("traces/control/*.json"))) < traces and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(delay)
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    return child.exitcode == -signal.SIGKILL


def test_an_exam_that_is_killed_again_and_again_ends_as_one_that_was_not(make_context, tmp_path):
    context, source = make_context(), random.Random(0)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert sit(context, whole).made == RUNS
    kills = 0
    for traces in (0, 1, 2, 3, 5, 6, 7, 9, 11, 12, 13, 14, 16, 17, 18, 20, 21):
        kills += killed(context, broken, traces, source.uniform(0, 0.15))
    assert kills >= 10
    before = curves(broken)
    summary = sit(context, broken)
    assert (summary.made, summary.kept) == (RUNS - len(before), len(before))
    assert curves(broken) == curves(whole) and len(curves(whole)) == RUNS
    assert sit(context, broken).made == 0


def test_any_rank_may_be_killed_at_ten_points_and_join_again(make_context, tmp_path):
    context, source, folder = make_context(), random.Random(1), tmp_path / "shared"
    assert sit(context, tmp_path / "whole").made == RUNS
    ranks = [start_rank(context, folder, rank) for rank in range(4)]
    kills, until = 0, time.monotonic() + 600
    for point in range(10):
        while len(curves(folder)) < 2 * point and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(source.uniform(0, 0.1))
        rank, finished = source.randrange(4), curves(folder)
        if ranks[rank].is_alive():
            os.kill(ranks[rank].pid, signal.SIGKILL)
            kills += 1
        ranks[rank].join()
        assert finished.items() <= curves(folder).items(), "what was finished stays as it was"
        ranks[rank] = start_rank(context, folder, rank)
    for rank in ranks:
        rank.join(300)
    assert kills >= 8 and [rank.exitcode for rank in ranks] == [0] * 4
    assert curves(folder) == curves(tmp_path / "whole") and len(curves(folder)) == RUNS


def start_rank(context, folder, rank):
    made = multiprocessing.get_context("fork").Process(target=sit_as, args=(context, folder, Share(rank, 4)))
    made.start()
    return made


def sit_as(context, folder, share):
    torch.set_num_threads(1)
    run_suite(context, ATTACKS, list(SETTINGS), SEEDS, folder, SETTINGS, trials=3, tuning_seeds=1, share=share)
