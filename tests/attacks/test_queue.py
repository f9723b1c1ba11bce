"""The order of an exam's runs: every attack goes through its own rounds, and what others wait for comes first."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from trace_builders import MODEL, data

from hf_immunize.attacks import ATTACKS, run_suite
from hf_immunize.attacks.core import suite
from hf_immunize.attacks.core.effort import Beyond
from hf_immunize.attacks.core.jobs import Queue
from hf_immunize.attacks.core.rounds import Course, compared_runs
from hf_immunize.attacks.core.shape import Result
from hf_immunize.attacks.core.sharing import Claims, Share
from hf_immunize.errors import RunMismatchError
from hf_immunize.exam import PROTOCOLS
from hf_immunize.records import AttackTrace, Evaluation

SETTINGS = {"lora": {"steps": (6,)}, "full_finetune": {"steps": (4,)}, "linear_probe_gd": {"steps": (350,)}}
SEEDS = (0, 1, 2, 3, 4)
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "exam_schedule.py"


def course(name, made=None, settings=SETTINGS, **options):
    """An attack's way; of its runs all count as made, or those alone that are in ``made``."""

    def found(name, runs):
        there = [run for run in runs if made is None or (name, run.trial, run.seed) in made]
        return [SimpleNamespace(trial=run.trial, seed=run.seed, curve=[]) for run in there], len(runs) - len(there)

    asked = compared_runs(ATTACKS[name], SEEDS, settings[name], 3, 1)
    return Course(name, ATTACKS[name], asked, SEEDS, found, **options)


def queue_of(*names, made=None, share=None, **options):
    return Queue({name: course(name, made, **options).rounds() for name in names}, share)


def told(jobs):
    return [(job.name, job.runs[0].seed) for job in jobs]


def keys(job):
    return {(job.name, run.trial, run.seed) for run in job.runs}


def test_what_has_most_to_come_after_it_is_taken_first():
    queue = queue_of("full_finetune", "linear_probe_gd", "lora")
    found = [(job.name, job.cost, job.urgency) for job in queue.waiting]
    assert found == [*[("lora", 6, 12)] * 3, *[("full_finetune", 4, 8)] * 3, ("linear_probe_gd", 7, 7)]


def test_finals_of_one_attack_are_there_while_first_runs_of_another_are_not():
    queue = queue_of("full_finetune", "lora")
    for job in [job for job in queue.waiting if job.name == "lora"]:
        assert {seed for _, seed in told(queue.waiting)} == {0}
        queue.finished(job)
    finals = [("lora", seed) for seed in SEEDS[1:]]
    first = [("full_finetune", 0)] * 3
    assert told(queue.waiting) == [*first, *finals], "8 steps one after the other, then 6"
    while queue.waiting:
        queue.finished(queue.waiting[0])
    assert not queue.retry() and not queue.blocked


def test_all_rounds_of_an_attack_come_one_after_the_other():
    def follow(name, traces, effort):
        wider = Beyond(traces[0].trial, "wider", "learning_rate", 0.5, 1)
        return replace(effort, beyond=(wider,)) if not effort.beyond else None

    rounds = list(course("lora", follow=follow, decided=lambda name, traces: len(traces) > 9).rounds())
    assert [[(job.runs[0].seed, job.urgency) for job in one.jobs] for one in rounds] == [
        [(0, 18)] * 3, [(0, 18)], [(1, 12), (2, 12)], [(3, 6), (4, 6)],
    ]
    rounds = list(course("lora", decided=lambda name, traces: len(traces) == 3 + 2).rounds())
    assert [len(one.jobs) for one in rounds] == [3, 2], "seeds that change nothing are left out"


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_share_every_round_and_wait_for_the_others(parts):
    made, every = set(), []
    for _ in range(3):
        for part in range(parts):
            queue = queue_of(*SETTINGS, made=made, share=Share(part=part, parts=parts), decided=lambda *_: False)
            while queue.waiting or queue.retry():
                job = queue.waiting[0]
                if not keys(job) <= made:
                    every.append(job)
                    made |= keys(job)
                queue.finished(job)
    assert len(made) == sum(len(job.runs) for job in every) and not queue.blocked
    whole = queue_of(*SETTINGS, made=None)
    while whole.waiting:
        assert keys(whole.waiting[0]) <= made
        whole.finished(whole.waiting[0])


def test_a_part_that_sees_nobody_elses_runs_makes_first_runs_alone_and_says_what_it_waits_for():
    every = []
    for part in range(2):
        made = set()
        queue = queue_of("lora", made=made, share=Share(part=part, parts=2))
        while queue.waiting or queue.retry():
            made |= keys(queue.waiting[0])
            queue.finished(queue.waiting[0])
        assert {seed for _, _, seed in made} == {0} and queue.blocked == {"lora": 3 - len(made)}
        every.extend(made)
    assert len(every) == len(set(every)) == 3


def test_seeds_that_may_change_nothing_wait_for_what_decides():
    """A part that made them before the others' runs were there could leave an exam with some of them alone."""
    made = {("lora", run.trial, run.seed) for run in course("lora").asked}
    queue = queue_of("lora", made=made, share=Share(part=0, parts=2), decided=lambda *_: True)
    while queue.waiting or queue.retry():
        made |= keys(queue.waiting[0])
        queue.finished(queue.waiting[0])
    assert {seed for _, _, seed in made} == {0, 1} and queue.blocked == {"lora": 1}


@dataclass
class Nothing:
    """A context of runs that take no time."""

    role = "control"
    device = "cpu"
    data = tuple(data())
    fingerprint = MODEL
    described = {}

    def holding(self, need):
        return None


def run(context, runs):
    for one in runs:
        score = one.config.learning_rate / 1000
        yield one, Result([Evaluation(step=1, validation=score, test=score)], one.config.steps, 0.1)


TABLE = {name: replace(ATTACKS[name], run=run) for name in ("lora", "full_finetune")}


def sit(folder, **options):
    return run_suite(Nothing(), TABLE, list(TABLE), SEEDS, folder, SETTINGS, trials=3, tuning_seeds=1, **options)


def test_a_process_goes_on_to_finals_while_another_is_at_the_last_first_run_of_another_attack(tmp_path, monkeypatch):
    """Only with the finals of LoRA does the other process end."""
    first = next(job for job in queue_of("full_finetune").waiting).runs[0]
    key = f"full_finetune__{first.trial}__seed0.json"
    seen = []
    with ExitStack() as other:
        assert other.enter_context(Claims(tmp_path / ".running" / "control").take(key))

        def progress(trace, made):
            seen.append((trace.attack, trace.seed))
            if seen.count(("lora", 4)):
                other.close()

        def waiting(seconds):
            raise AssertionError(f"nothing to do after {seen}")

        monkeypatch.setattr(suite, "time", SimpleNamespace(sleep=waiting))
        summary = sit(tmp_path, progress=progress)
    assert summary.made == len(seen) == 2 * (3 + 4)
    assert seen.index(("lora", 4)) < len(seen) - 1 - seen[::-1].index(("full_finetune", 0))


def test_whoever_comes_back_keeps_what_is_there_before_he_makes_anything(tmp_path):
    sit(tmp_path)
    lost = sorted((tmp_path / "traces" / "control").glob("lora*seed0.json"))[0]
    lost.unlink()
    seen = []
    summary = sit(tmp_path, progress=lambda trace, made: seen.append((trace.file_name, made)))
    assert (summary.made, summary.kept) == (1, 2 * (3 + 4) - 1)
    full = [made for name, made in seen[: 2 + 3 + 4]]
    assert not any(full) and seen[9] == (lost.name, True)


def test_a_final_that_tells_of_another_run_is_refused_before_anything_is_made(tmp_path):
    sit(tmp_path)
    target = tmp_path / "traces" / "control"
    sorted(target.glob("full_finetune*seed0.json"))[0].unlink()
    final = sorted(target.glob("lora*seed4.json"))[0]
    AttackTrace.read(final).model_copy(update={"trial": "another"}).write(final)
    left = sorted(target.iterdir())
    with pytest.raises(RunMismatchError, match="got another trial"):
        sit(tmp_path)
    assert sorted(target.iterdir()) == left


@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize("name", ["quick", "standard"])
def test_simulated_devices_end_within_a_tenth_of_the_best_schedule(name, model, monkeypatch):
    spec = importlib.util.spec_from_file_location("exam_schedule", BENCHMARK)
    schedule = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "exam_schedule", schedule)  # its dataclasses ask for it
    spec.loader.exec_module(schedule)
    exam = schedule.planned_exam(PROTOCOLS[name], model)
    draws = [schedule.drawn_seconds(exam, draw) for draw in range(50)]
    for devices in (1, 2, 4):
        ratios = sorted(schedule.ratio(exam, seconds, devices) for seconds in draws)
        assert ratios[0] >= 1 - 1e-9, "nothing beats the bound"
        assert statistics.median(ratios) <= 1.01 and ratios[-3] <= 1.1
