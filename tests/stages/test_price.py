"""What an exam costs, told before it starts, is what it then takes."""

from pathlib import Path

import pytest

from hf_immunize.attacks import AttackContext, run_suite
from hf_immunize.data import fingerprint
from hf_immunize.records import AttackTrace
from hf_immunize.stages.attack import AttackOptions, AttackPlan
from hf_immunize.stages.price import Price
from hf_immunize.tasks import FAMILIES

NAMES = ["ridge_probe", "lora", "full_finetune"]
FEW = ["lora.steps=8", "lora.learning_rate=1e-3", "lora.batch_size=6", "full_finetune.steps=4",
       "full_finetune.learning_rate=1e-3,1e-2", "full_finetune.batch_size=6"]


def plan_of(**options):
    return AttackPlan.of(AttackOptions("m", attacks=NAMES, settings=FEW, seeds=[0, 1], tuning_seeds=0, **options),
                         FAMILIES["classes"])


@pytest.fixture
def sat(tmp_path, make_vit, make_pixels):
    """An attacker's context of a tiny model, and the runs that the plan makes on it."""
    folder = tmp_path / "model"
    make_vit().save_pretrained(folder)
    splits = {name: make_pixels(rows, seed=seed)
              for seed, (name, rows) in enumerate({"attack": 30, "validation": 12, "test": 12}.items())}
    data = tuple(fingerprint(split, source="blobs", role=name) for name, split in splits.items())
    context = AttackContext(folder=folder, role="subject", data=data, **splits)
    plan = plan_of()
    run_suite(context, plan.table, plan.names, plan.seeds, tmp_path, plan.settings)
    return context, plan, [AttackTrace.read(path) for path in Path(tmp_path, "traces", "subject").glob("*.json")]


def test_runs_steps_and_images_are_those_that_are_made(sat):
    _, plan, traces = sat
    price = Price.of(plan)
    trained = [trace for trace in traces if trace.unit == "step"]
    assert price.runs == plan.count() == len(traces)
    assert price.steps == sum(trace.budget for trace in trained) == 2 * 8 + 4 * 4
    assert price.images == 2 * 8 * 6 + 4 * 4 * 6 == sum(trace.samples for trace in trained)


def test_operations_are_those_of_the_traces_and_growth_is_told(sat):
    context, plan, traces = sat
    told = Price.of(plan).told(context)
    counted = sum(trace.flops for trace in traces if trace.attack == "full_finetune")
    assert "operations" in told and "MB of traces" in told and "on this device" in told and counted > 0
    whole = AttackPlan.of(AttackOptions("m"), FAMILIES["classes"])
    assert Price.of(whole).most > 1 and f"grow up to {Price.of(whole).most} times" in Price.of(whole).told(context)
    fixed = AttackPlan.of(AttackOptions("m", adapt=False), FAMILIES["classes"])
    assert Price.of(fixed).most == 1 and "grow" not in Price.of(fixed).told(context)
