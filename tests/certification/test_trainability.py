"""Benign trainability: two one-sided tests, and real fine-tuning of a third task on tiny models."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_exam import PROTOCOL, blobs
from trace_builders import side_of

from hf_immunize.attacks import TRAINABILITY, AttackContext, load_classifier, run_suite
from hf_immunize.certification import build_certificate, measure_trainability
from hf_immunize.certification.trainability import judge_drop
from hf_immunize.data import fingerprint
from hf_immunize.errors import IncompleteExamError, RecordError
from hf_immunize.exam import PROTOCOLS, Rule
from hf_immunize.metrics import mean_interval
from hf_immunize.records import Interval, PlannedAttack

RULE = Rule()
METHODS = [PlannedAttack(attack=name, family=about.family, unit=about.unit) for name, about in TRAINABILITY.items()]
NAME = "benign_lora"


def runs(role, accuracies):
    return [
        run for seed, high in enumerate(accuracies)
        for run in [side_of(role, [5], attack=NAME, high=high)[0].model_copy(update={"seed": seed})]
    ]


def lora(subject, control):
    traces = {"subject": runs("subject", subject), "control": runs("control", control)}
    found = measure_trainability(traces, METHODS, RULE)
    return {item.attack: item for item in found}[NAME]


def test_equal_learning_is_equivalent_and_lost_learning_is_worse():
    same = lora((0.90, 0.91, 0.92), (0.91, 0.90, 0.92))
    assert same.verdict == "EQUIVALENT" and same.drop.level == 0.9 and same.seeds == [0, 1, 2]
    assert same.slow_down.estimate == 1
    assert lora((0.60, 0.61, 0.62), (0.90, 0.91, 0.90)).verdict == "WORSE"
    assert lora((0.95, 0.96, 0.97), (0.60, 0.61, 0.62)).verdict == "EQUIVALENT"
    assert lora((0.5, 0.9, 0.99), (0.90, 0.91, 0.92)).verdict == "INCONCLUSIVE"
    assert lora((0.9,), (0.9,)).verdict == "INCONCLUSIVE"


@pytest.mark.parametrize("seed", range(20))
def test_equivalence_is_that_of_two_one_sided_t_tests(seed):
    random = np.random.default_rng(seed)
    drops = random.normal(random.uniform(-0.02, 0.06), 0.03, 5)
    verdict, _ = judge_drop(mean_interval(drops.tolist(), 0.9), 0.05)
    not_worse = stats.ttest_1samp(drops, 0.05, alternative="less").pvalue < 0.05
    not_better = stats.ttest_1samp(drops, -0.05, alternative="greater").pvalue < 0.05
    worse = stats.ttest_1samp(drops, 0.05, alternative="greater").pvalue < 0.05
    assert verdict == ("WORSE" if worse else "EQUIVALENT" if not_worse else "INCONCLUSIVE")
    assert not (not_worse and not_better) or verdict == "EQUIVALENT"


def test_methods_that_were_not_tried_are_named_and_no_third_task_is_nothing():
    assert measure_trainability({"subject": [], "control": []}, METHODS, RULE) == []
    traces = {"subject": runs("subject", (0.9, 0.9)), "control": runs("control", (0.9, 0.9))}
    found = measure_trainability(traces, METHODS, RULE)
    assert [item.attack for item in found] == list(TRAINABILITY)
    assert {item.attack: item.verdict for item in found} == {
        "benign_probe": "NOT RUN", NAME: "EQUIVALENT", "benign_full_finetune": "NOT RUN"}
    with pytest.raises(IncompleteExamError, match="missing on the control"):
        lora((0.9, 0.9, 0.9), (0.9, 0.9))


def test_an_interval_that_is_open_is_inconclusive():
    assert judge_drop(Interval(estimate=0.0, low=None, high=None, samples=1), 0.05)[0] == "INCONCLUSIVE"


def test_presets_plan_the_benign_methods_with_the_attacks_budgets():
    assert PROTOCOLS["quick"].benign_settings() == ("benign_lora.steps=120", "benign_full_finetune.steps=120")


@pytest.fixture
def learn_benign(exam_data):
    sizes = {"attack": 60, "validation": 30, "test": 60}
    splits = {name: blobs(rows, seed, 2) for seed, (name, rows) in enumerate(sizes.items(), start=31)}
    for split in splits.values():
        split.pixel_values = -split.pixel_values.flip(3)
    prints = tuple(fingerprint(split, source="blobs", role=f"benign {name}") for name, split in splits.items())
    settings = {"benign_probe": {"steps": (50,), "learning_rate": (0.1,)},
                "benign_lora": {"steps": (25,), "learning_rate": (1e-2,)},
                "benign_full_finetune": {"steps": (25,), "learning_rate": (1e-2,)}}

    def learn(folder, role):
        context = AttackContext(folder=folder, role=role, data=prints, **splits)
        run_suite(context, TRAINABILITY, list(settings), (0, 1, 2), folder, settings)

    learn.data = dataclasses.replace(exam_data[0], benign=prints)
    return learn


def test_the_base_learns_as_the_base_and_it_is_in_the_certificate(exam_folders, exam_data, learn_benign):
    base, subject = exam_folders
    learn_benign(base, "control"), learn_benign(subject, "subject")
    certificate = build_certificate(subject, base, learn_benign.data, PROTOCOL)
    assert {item.attack: item.verdict for item in certificate.trainability} == dict.fromkeys(TRAINABILITY, "EQUIVALENT")
    assert all(item.drop.estimate == 0 and min(item.base) > 0.7 for item in certificate.trainability)
    assert [split.role for split in certificate.benign_data] == ["benign attack", "benign validation", "benign test"]
    assert not any("benign trainability" in line for line in certificate.not_run)
    assert not set(TRAINABILITY) & {cell.attack for cell in certificate.cells}
    assert "benign full_finetune EQUIVALENT" in certificate.statement
    with pytest.raises(RecordError, match="expected traces on the benign splits of this exam"):
        build_certificate(subject, base, exam_data[0], PROTOCOL)


@pytest.mark.slow
def test_a_model_that_learns_nothing_any_more_is_no_success(exam_folders, learn_benign):
    from tiny_exam import sit_exam

    base, subject = exam_folders
    shutil.rmtree(subject / "traces")
    model = load_classifier(subject)
    with torch.no_grad():
        for name, parameter in model.vit.named_parameters():
            if "layernorm" in name or "norm" in name.split("."):
                parameter.zero_()
    model.save_pretrained(subject)
    sit_exam(subject, "subject", (learn_benign.data, _harmful(learn_benign)))
    learn_benign(base, "control"), learn_benign(subject, "subject")
    certificate = build_certificate(subject, base, learn_benign.data, PROTOCOL)
    verdicts = {item.attack: item.verdict for item in certificate.trainability}
    assert verdicts["benign_probe"] == "WORSE" and certificate.overall == "FAILS"
    assert "benign probe WORSE" in certificate.statement


def _harmful(learn):
    sizes = {"attack": 60, "validation": 30, "test": 60}
    return {name: blobs(rows, seed, 3) for seed, (name, rows) in enumerate(sizes.items(), start=1)}
