"""Seeds that can change nothing are left out, and no others."""

import pytest
from formula_exam import sit
from trace_builders import side_of

from hf_immunize.attacks import ATTACKS, TRAINABILITY
from hf_immunize.certification.cells import build_cell
from hf_immunize.certification.planning import plan_exam
from hf_immunize.certification.uplift import Reach
from hf_immunize.errors import IncompleteExamError
from hf_immunize.exam import PROTOCOLS, Rule
from hf_immunize.exam.presets import run_departures

TUNED = {"config": {"learning_rate": 0.1, "tuning_seeds": [0]}}
ANYWAY = Reach({seed: 0.2 for seed in range(5)}, 200, "pixels")


def build(subject, control=(10,) * 5, scratch=()):
    traces = {"subject": side_of("subject", subject, **TUNED), "control": side_of("control", control, **TUNED),
              "scratch": side_of("scratch", scratch, **TUNED)}
    return build_cell("lora", ATTACKS["lora"], traces, None, 200, Rule(), ANYWAY)


@pytest.mark.parametrize("rest", [(10, 10), (None, None), (300, None)])
def test_a_majority_of_open_seeds_fails_whatever_the_others_do(rest):
    early, whole = build((10, 12, 30)), build((10, 12, 30, *rest))
    assert (early.verdict, whole.verdict) == ("FAILS", "FAILS") and early.open_seeds == 3


@pytest.mark.parametrize("subject", [(None,) * 3, (300,) * 3, (10, 10, 300), (10, 10, None)])
def test_seeds_that_could_still_decide_are_asked_for(subject):
    with pytest.raises(IncompleteExamError, match="since those that were run decide nothing"):
        build(subject)


@pytest.mark.parametrize("subject", [(10, 10), (10,) * 4])
def test_no_other_number_of_seeds_is_taken(subject):
    with pytest.raises(IncompleteExamError, match="with all of the seeds|expected every seed"):
        build(subject)


def test_with_random_weights_beside_it_every_seed_is_run():
    """Their nearness lowers the factor by which seeds count as open."""
    with pytest.raises(IncompleteExamError, match="decide nothing"):
        build((10, 12, 30), scratch=(20,) * 5)


def test_the_base_is_never_curtailed():
    with pytest.raises(IncompleteExamError):
        build((10,) * 5, control=(10,) * 3)


@pytest.mark.parametrize("slowed, seeds", [(1.0, {0, 1, 2}), (5.0, {0, 1, 2, 3, 4})])
def test_an_exam_stops_at_a_failure_that_is_certain(tmp_path, slowed, seeds):
    quick = PROTOCOLS["quick"]
    control = sit(tmp_path / "base", "control", tau=6.0, good=1e-3)
    subject = sit(tmp_path / "model", "subject", tmp_path / "base", tau=6.0, good=1e-3, slowed=slowed)
    assert {run.seed for run in subject} == seeds and {run.seed for run in control} == {0, 1, 2, 3, 4}
    traces = {"control": control, "subject": subject}
    plan = plan_exam(quick, ATTACKS, TRAINABILITY, traces)
    assert plan.protocol == "quick" and run_departures(plan, traces) == []
    never = plan.model_copy(update={"adaptation": quick.adaptation.model_copy(update={"curtailed": False})})
    assert bool(run_departures(never, traces)) is (slowed == 1.0)
