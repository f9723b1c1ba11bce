"""One process and four give equal certificates."""

import json
import multiprocessing
import shutil

import pytest
import torch
from tiny_exam import SETTINGS

from hf_immunize.attacks import ATTACKS, AttackContext, run_suite
from hf_immunize.attacks.core.sharing import Share
from hf_immunize.certification import Protocol, build_certificate

pytestmark = pytest.mark.slow
SEEDS = (0, 1, 2)
FORK = multiprocessing.get_context("fork")
OF_THE_MOMENT = {"seconds", "created", "provenance", "traces"}
"""Times of the day, durations, and digests of the traces that hold them."""


def sit(context, folder, share):
    torch.set_num_threads(1)
    run_suite(context, ATTACKS, list(SETTINGS), SEEDS, folder, SETTINGS, share=share)


def certificate_of(root, source, exam_data, processes):
    """What a certificate says of an exam by so many processes, without what differs from one minute to the next."""
    data, splits = exam_data
    base, subject = root / "base", root / "subject"
    for folder, role in ((base, "control"), (subject, "subject")):
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("traces"))
        context = AttackContext(folder=folder, role=role, data=data.harmful, **splits)
        ranks = [FORK.Process(target=sit, args=(context, folder, Share(rank, processes))) for rank in range(processes)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert [rank.exitcode for rank in ranks] == [0] * processes
    made = build_certificate(subject, base, data, Protocol(attacks=tuple(SETTINGS), seeds=SEEDS))
    assert len(made.traces) == len(list(subject.glob("traces/*/*.json"))) > 10
    return lasting(json.loads(made.model_dump_json()))


def lasting(value):
    if isinstance(value, dict):
        return {name: lasting(part) for name, part in value.items() if name not in OF_THE_MOMENT}
    return [lasting(part) for part in value] if isinstance(value, list) else value


def test_one_process_and_four_give_equal_certificates(tmp_path, trained_base, exam_data):
    one, four = (certificate_of(tmp_path / str(count), trained_base, exam_data, count) for count in (1, 4))
    assert one["cells"] and one == four
