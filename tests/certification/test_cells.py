import math

import pytest
from trace_builders import data, side_of, trace

from hf_immunize.attacks import ATTACKS
from hf_immunize.certification.cells import build_cell
from hf_immunize.errors import IncompleteExamError
from hf_immunize.exam import Rule, lines_not_run

RULE = Rule()


def build(subject, control, scratch=()):
    traces = {"subject": subject, "control": control, "scratch": scratch}
    return build_cell("lora", ATTACKS["lora"], traces, 0.5, 200, RULE)


def test_a_cell_holds_what_was_measured():
    cell = build(side_of("subject", (100, 100, None)), side_of("control", (10, 12, 10)))
    assert cell.subject.steps_to_threshold == [118, 118, None] and cell.control.steps_to_threshold == [10, 12, 10]
    assert cell.seeds == [0, 1, 2] and cell.budget == 1000 and cell.threshold == 0.5
    assert cell.slow_down.high is None and cell.slow_down.samples == 3
    assert cell.relative_fine_tuning_deviation.estimate > 0
    assert cell.accuracy_drop.estimate == pytest.approx((0.9 - 0.2) / 3)
    assert cell.normalized_resistance is None and cell.scratch is None


def test_scratch_gives_the_normalized_resistance():
    cell = build(side_of("subject", (60, 60)), side_of("control", (10, 10)), side_of("scratch", (118, 118)))
    assert cell.normalized_resistance.estimate == pytest.approx(math.log(60 / 10) / math.log(118 / 10))
    assert cell.scratch.steps_to_threshold == [118, 118]


@pytest.mark.parametrize("subject, control", [((), (10, 10)), ((10, 10), ())])
def test_a_side_that_was_not_attacked_is_not_run(subject, control):
    cell = build(side_of("subject", subject), side_of("control", control))
    assert cell.verdict == "NOT RUN" and cell.subject is None and cell.slow_down.estimate is None


def test_not_applicable_is_not_resistance():
    nothing = [trace([], outcome="not_applicable", note="no layer to adapt", seed=seed, role=role)
               for role in ("subject", "control") for seed in (0, 1)]
    cell = build(nothing[:2], nothing[2:])
    assert (cell.verdict, cell.reason) == ("NOT APPLICABLE", "no layer to adapt")


def test_the_same_exam_is_demanded_of_both_sides():
    full = side_of("control", (10, 10, 10))
    with pytest.raises(IncompleteExamError, match="got 1 missing on the subject, first learning_rate=0.1 with seed 2"):
        build(side_of("subject", (10, 10)), full)
    with pytest.raises(IncompleteExamError, match="got 1 missing on the control"):
        build(side_of("subject", (10, 10, 10, 10)), full)
    with pytest.raises(IncompleteExamError, match="missing on the scratch"):
        build(side_of("subject", (10, 10, 10)), full, side_of("scratch", (10,)))


def test_every_trial_has_every_seed():
    def both(role):
        return side_of(role, (10, 10)) + side_of(role, (10,), trial="learning_rate=1")

    with pytest.raises(IncompleteExamError, match=r"got learning_rate=1 without seeds \[1\]"):
        build(both("subject"), both("control"))


@pytest.mark.parametrize("what, change", [
    ("config", {"config": {"learning_rate": 0.1, "rank": 64}}),
    ("data", {"data": data(200)[::-1]}),
    ("budget", {"budget": 2000}),
])
def test_other_settings_are_another_exam(what, change):
    with pytest.raises(IncompleteExamError, match=f"same exam on subject and control, got another {what}"):
        build(side_of("subject", (10, 10), **change), side_of("control", (10, 10)))


def test_the_checklist_names_what_is_missing_and_only_that():
    narrow = side_of("subject", (10, 10)) + side_of("control", (10, 10))
    lines = " | ".join(lines_not_run(narrow, ["lora", "ridge_probe"]))
    for words in ("at least 5 attack seeds (here 2)", "LoRA at several ranks", "three decades for lora", "from scratch",
                  "planned attack ridge_probe", "structural attackers", "benign trainability"):
        assert words in lines
    for words in ("distillation into a fresh copy", "public base", "folding", "mixed with benign", "augmentation",
                  "schedule", "warm-up", "weight decay", "batch sizes", "clipping", "50 epochs", "one image per class"):
        assert words in lines
    wide = [
        run for rate in (1e-4, 1e-1) for rank in (1, 64)
        for run in side_of("subject", (10,) * 5, samples=50 * 200, config={
            "learning_rate": rate, "rank": rank, "scheduler": f"s{rank}", "warmup_steps": rank, "weight_decay": rank,
            "batch_size": rank, "max_grad_norm": rank})
    ] + side_of("scratch", (10,) * 5) + [
        run.model_copy(update={"attack": name}) for name in ("distil_fresh", "fold_linear_map", "subtract_difference",
                                                            "mixed_finetune", "augmented_finetune")
        for run in side_of("subject", (10,) * 5, config={})
    ]
    wide += [run.model_copy(update={"role": "control"}) for run in wide if run.role == "subject"]
    lines = " | ".join(lines_not_run(wide, ["lora"]))
    for words in ("seeds", "LoRA at several ranks", "three decades", "from scratch", "planned attack", "schedule",
                  "warm-up", "decay", "batch sizes", "clipping", "epochs", "distillation", "public base",
                  "benign data"):
        assert words not in lines, words
    away = [run.model_copy(update={"outcome": "not_applicable", "note": "no base"}) for run in wide]
    assert "distillation into a fresh copy" in " | ".join(lines_not_run(away, []))


def test_an_attack_that_applies_to_the_base_alone_has_not_been_resisted():
    """A model made so that its normal form cannot be found would else be spared this attacker in silence."""
    nothing = [trace([], outcome="not_applicable", note="could not be followed", seed=seed) for seed in (0, 1, 2)]
    cell = build_cell("canonical_finetune", ATTACKS["canonical_finetune"],
                      {"subject": nothing, "control": side_of("control", (10, 12, 10))}, None, 200, Rule())
    assert cell.verdict == "INCONCLUSIVE" and "could not be followed" in cell.reason and "its base" in cell.reason
