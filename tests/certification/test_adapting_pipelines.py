"""Exams of pipelines follow their base too: the same rules on a score that is told by its gain."""

import pytest
from formula_exam import Denoiser, sit

from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, DIFFUSION_TRAINABILITY
from hf_immunize.certification.adapting import follow_base
from hf_immunize.certification.cells import build_cell
from hf_immunize.certification.planning import plan_exam, with_runs
from hf_immunize.certification.proposing import proposed
from hf_immunize.exam import DIFFUSION_PROTOCOLS
from hf_immunize.exam.presets import run_departures

NAME = "diffusion_full_finetune"


@pytest.fixture(scope="module", params=["diffusion_quick", "diffusion_standard"])
def exam(request, tmp_path_factory):
    protocol, folder = DIFFUSION_PROTOCOLS[request.param], tmp_path_factory.mktemp(request.param)
    control = sit(folder / "base", "control", protocol=protocol, kind=Denoiser)
    subject = sit(folder / "model", "subject", folder / "base", protocol=protocol, kind=Denoiser)
    return protocol, {"control": control, "subject": subject}


def test_a_slow_base_is_given_more_steps_and_a_best_rate_at_the_edge_a_wider_range(exam):
    protocol, traces = exam
    plan = plan_exam(protocol, DIFFUSION_ATTACKS, DIFFUSION_TRAINABILITY, traces)
    kept, plan = follow_base(traces, with_runs(plan, traces), protocol.rule)
    item = next(one for one in plan.attacks if one.attack == NAME)
    largest = 200 * protocol.adaptation.most
    assert item.adapts and item.budgets[0] == 200 and item.budget == largest
    assert f"learning_rate=0.1,steps={largest}" in item.widened
    assert plan.protocol == protocol.name and run_departures(plan, traces) == []
    cell = build_cell(NAME, DIFFUSION_ATTACKS[NAME], kept, None, 100_000, protocol.rule)
    assert cell.budget == largest
    # twice its budget still hides the model's steps, eight times shows them; 200 would cap what is seen at 1.3 times
    assert (cell.slow_down.estimate is None) is (largest == 400)
    assert cell.slow_down.low > 2.5


def test_the_search_proposes_as_many_rates_to_both_sides(exam):
    protocol, traces = exam
    asked = 0 if protocol.search is None else protocol.search.further
    for runs in traces.values():
        assert len({run.trial for run in runs if proposed(run)}) == asked
