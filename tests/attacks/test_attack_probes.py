"""Probes against one-by-one training with torch.optim, and against scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from equality import units_apart
from torch import nn

from hf_immunize.attacks import ATTACKS, Run, _probes, evaluation_steps, plan_runs, run_suite
from hf_immunize.attacks.vision._probes import ProbeData, initial_weights, probe_data
from hf_immunize.attacks.vision.ridge_probe import RidgeProbe, _solve
from hf_immunize.linalg.whitening import fit_feature_map
from hf_immunize.records import AttackTrace

LinearProbeAdam, LinearProbeGD, StandardizedProbeAdam = (
    ATTACKS[name].config for name in ("linear_probe_adam", "linear_probe_gd", "standardized_probe_adam")
)

def one_by_one(context, seed, config, optimizer):
    """The same probe as an nn.Linear, trained by torch.optim in a plain loop."""
    rows = context.draw_rows(seed)
    features = context.features(seed)
    mapped = fit_feature_map(features["attack"][rows], config.features)
    x, y = mapped(features["attack"][rows]), context.attack.labels[rows]
    start = initial_weights(probe_data(context, [seed], config.features), [seed], 1)[0]
    probe = nn.Linear(x.shape[1], 3).double()
    with torch.no_grad():
        probe.weight.copy_(start[:, :-1])
        probe.bias.copy_(start[:, -1])
    stepper = optimizer(probe.parameters(), lr=config.learning_rate)
    curve = []
    for step in range(1, config.steps + 1):
        stepper.zero_grad()
        nn.functional.cross_entropy(probe(x), y).backward()
        stepper.step()
        if step in evaluation_steps(config.steps):
            with torch.no_grad():
                hits = [
                    (probe(mapped(features[name])).argmax(1) == getattr(context, name).labels).double().mean().item()
                    for name in ("validation", "test")
                ]
            curve.append((step, *hits))
    return curve


def as_tuples(curve):
    return [(point.step, point.validation, point.test) for point in curve]


@pytest.mark.parametrize("name, config, optimizer", [
    ("linear_probe_gd", LinearProbeGD(steps=40), torch.optim.SGD),
    ("linear_probe_adam", LinearProbeAdam(steps=40), torch.optim.Adam),
    ("standardized_probe_adam", StandardizedProbeAdam(steps=40), torch.optim.Adam),
])
@pytest.mark.parametrize("role", ["control", "scratch"])
def test_batched_probes_equal_torch_optim_one_by_one(make_context, name, config, optimizer, role):
    context = make_context(role)
    runs = plan_runs(ATTACKS[name], [0, 1, 2], {"steps": (40,)})
    results = {(run.trial, run.seed): result for run, result in ATTACKS[name].run(context, runs)}
    assert len(results) == len(runs) >= 12
    checked = [run for run in runs if run.config.learning_rate in (0.1, 4.0, 0.01)]
    assert checked
    for run in checked:
        found = results[run.trial, run.seed]
        wanted = one_by_one(context, run.seed, replace(config, learning_rate=run.config.learning_rate), optimizer)
        assert np.array(as_tuples(found.curve)) == pytest.approx(np.array(wanted), abs=1e-9), run.trial


@pytest.mark.parametrize("value", [float("nan"), 1e200])
def test_a_ridge_solve_that_fails_is_an_attack_that_diverged(value):
    rows = torch.full((1, 6, 3), value, dtype=torch.float64) * torch.arange(1, 7)[None, :, None]
    data = ProbeData(rows, torch.arange(6)[None] % 2, rows, torch.arange(6) % 2, validation_rows=3, classes=2)
    found = _solve(data, penalty=0.1, started=0.0)
    assert found.outcome == "diverged" and "the solve failed: expected a matrix that can be" in found.note


@pytest.mark.parametrize("name", ["linear_probe_gd", "linear_probe_momentum", "whitened_probe_gd"])
def test_fewer_rows_than_columns_are_trained_in_the_row_space_and_nobody_sees_it(make_context, monkeypatch, name):
    """9 rows of 16 columns: compressed and plain programs, and torch one by one, give the same curves."""
    context = make_context(rows=12)
    assert len(context.draw_rows(0)) < 16
    runs = plan_runs(ATTACKS[name], [0, 1], {"steps": (40,)})
    compressed = {(run.trial, run.seed): as_tuples(result.curve) for run, result in ATTACKS[name].run(context, runs)}
    monkeypatch.setattr(_probes, "ROTATION_INVARIANT", ())
    plain = {(run.trial, run.seed): as_tuples(result.curve) for run, result in ATTACKS[name].run(context, runs)}
    assert compressed == plain and len({tuple(curve) for curve in plain.values()}) > 2


def test_rules_that_share_a_program_are_those_that_run_alone(make_context):
    data = _probes.probe_data(make_context(), [0, 1], "centered")
    rules = {"gd": _probes.gradient_descent, "momentum": _probes.momentum, "adam": _probes.adam}
    rates = [1.0, 0.1]
    together = initial_weights(data, [0, 1], 6)
    for _ in _probes.train_probes(data, together, [(rates, rule()) for rule in rules.values()], 20):
        pass
    for place, rule in enumerate(rules.values()):
        alone = initial_weights(data, [0, 1], 2)
        for _ in _probes.train_probes(data, alone, [(rates, rule())], 20):
            pass
        mine = together.view(2, 3, 6, -1)[:, :, 2 * place : 2 * place + 2]
        # float32 products of 6 trials and of 2 are summed in another order: at each of 20 steps a unit, which every
        # later step's gradient hands on
        assert units_apart(mine.float(), alone.view(2, 3, 2, -1).float()) <= 20 * 20 / 2
        wrong = together.view(2, 3, 6, -1)[:, :, [2 * place, 2 * place - 1]]  # another rule's second trial
        assert units_apart(wrong.float(), alone.view(2, 3, 2, -1).float()) > 1e4


def test_a_run_alone_gives_the_curve_it_has_in_company(make_context):
    context = make_context()
    attack = ATTACKS["linear_probe_gd"]
    runs = plan_runs(attack, [0, 1, 2], {"steps": (200,), "learning_rate": (0.1, 1.0)})
    together = {(run.trial, run.seed): as_tuples(result.curve) for run, result in attack.run(context, runs)}
    for run in runs[::2]:
        ((_, alone),) = attack.run(context, [run])
        assert as_tuples(alone.curve) == together[run.trial, run.seed]


@pytest.mark.parametrize("name", ["linear_probe_gd", "standardized_probe_adam"])
def test_a_run_that_is_missing_comes_back_the_same_at_every_rate(make_context, tmp_path, name):
    context, settings = make_context(), {name: {"steps": (200,)}}
    run_suite(context, ATTACKS, [name], [0, 1, 2], tmp_path, settings)
    paths = sorted(tmp_path.glob("traces/*/*.json"))
    before = {path.name: AttackTrace.read(path).curve for path in paths}
    assert len(paths) >= 12
    for path in paths[1::3]:
        path.unlink()
    summary = run_suite(context, ATTACKS, [name], [0, 1, 2], tmp_path, settings)
    assert summary.made == len(paths[1::3])
    assert {path.name: AttackTrace.read(path).curve for path in paths} == before


def test_runs_of_a_batched_attack_are_made_again_together(make_context, tmp_path):
    company = []

    def run(context, runs):
        company.append(len(runs))
        yield from ATTACKS["linear_probe_gd"].run(context, runs)

    table = {"linear_probe_gd": replace(ATTACKS["linear_probe_gd"], run=run)}
    context, settings = make_context(), {"linear_probe_gd": {"steps": (5,), "learning_rate": (0.1, 1.0)}}
    run_suite(context, table, ["linear_probe_gd"], [0, 1, 2], tmp_path, settings)
    next(tmp_path.glob("traces/*/*.json")).unlink()
    assert run_suite(context, table, ["linear_probe_gd"], [0, 1, 2], tmp_path, settings).made == 1
    assert company == [6, 6]


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("scale", [1.0, 800.0])
def test_probabilities_are_the_softmax_with_a_zero_for_the_last_class(classes, scale):
    logits = scale * torch.randn(2, classes - 1, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    wanted = torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1).softmax(dim=1)[:, :-1]
    torch.testing.assert_close(_probes.class_probabilities(logits.clone()), wanted, rtol=1e-12, atol=1e-15)


def test_seeds_that_share_rows_are_one_set_and_give_the_curves_of_sets_of_their_own(make_context, monkeypatch):
    context = replace(make_context(), attack_fraction=1.0)
    config = LinearProbeAdam(learning_rate=1e-2, steps=50)
    runs = [Run(config, "x", seed) for seed in (0, 1, 2)]
    assert len(probe_data(context, [0, 1, 2], config.features).train_GND) == 1
    shared = [as_tuples(result.curve) for _, result in ATTACKS["linear_probe_adam"].run(context, runs)]
    own = [as_tuples(result.curve) for run in runs for _, result in ATTACKS["linear_probe_adam"].run(context, [run])]
    assert shared == own and shared[0] != shared[1]


def test_gradient_descent_does_not_care_for_scale_and_offset_of_features(make_context, monkeypatch):
    context = make_context()
    plain = context.features(0)
    run = Run(LinearProbeGD(learning_rate=4.0, steps=100), "x", 0)
    ((_, before),) = ATTACKS["linear_probe_gd"].run(context, [run])
    monkeypatch.setitem(context._features, (None, "classifier"), {k: v.double() * 1e3 + 77 for k, v in plain.items()})
    ((_, after),) = ATTACKS["linear_probe_gd"].run(context, [run])
    assert as_tuples(before.curve) == as_tuples(after.curve)


@pytest.mark.parametrize("penalty", [1e-6, 1e-3, 1e-1])
@pytest.mark.parametrize("features", ["centered", "standardized"])
def test_ridge_equals_scikit_learn(make_context, penalty, features):
    from sklearn.linear_model import Ridge

    context = make_context()
    ((_, found),) = ATTACKS["ridge_probe"].run(context, [Run(RidgeProbe(penalty, features), "x", 2)])
    rows = context.draw_rows(2)
    raw = context.features(2)
    mapped = fit_feature_map(raw["attack"][rows], features)
    x, y = mapped(raw["attack"][rows]), nn.functional.one_hot(context.attack.labels[rows], 3).double()
    sigma = torch.linalg.svdvals(x - x.mean(0))[0]
    reference = Ridge(alpha=float(penalty * sigma**2), solver="svd").fit(x.numpy(), y.numpy())
    for name in ("validation", "test"):
        guess = reference.predict(mapped(raw[name]).numpy()).argmax(1)
        accuracy = (torch.as_tensor(guess) == getattr(context, name).labels).double().mean().item()
        assert getattr(found.curve[0], name) == pytest.approx(accuracy)
    assert [point.step for point in found.curve] == [1]


def test_a_rate_that_overflows_is_a_diverged_run_and_spoils_no_other(make_context):
    context = make_context()
    runs = [Run(LinearProbeGD(learning_rate=rate, steps=10), f"{rate:g}", 0) for rate in (4.0, float("inf"))]
    good, bad = (result for _, result in ATTACKS["linear_probe_gd"].run(context, runs))
    ((_, alone),) = ATTACKS["linear_probe_gd"].run(context, runs[:1])
    assert as_tuples(good.curve) == as_tuples(alone.curve) and good.outcome == "completed"
    assert bad.outcome == "diverged" and "logits were not finite at step" in bad.note


@pytest.mark.parametrize("name", ["linear_probe_gd", "standardized_probe_adam", "ridge_probe"])
def test_features_collapsed_to_a_point_leave_chance(make_context, monkeypatch, name):
    context = make_context()
    same = {key: torch.full_like(value, 0.3) for key, value in context.features(0).items()}
    monkeypatch.setitem(context._features, (None, "classifier"), same)
    runs = plan_runs(ATTACKS[name], [0], {} if name == "ridge_probe" else {"steps": (50,)})
    results = [result for _, result in ATTACKS[name].run(context, runs)]
    assert {result.outcome for result in results} == {"completed"}
    assert {round(result.curve[-1].test, 6) for result in results} == {round(1 / 3, 6)}


@pytest.mark.parametrize("budget", [1, 2, 7, 100, 20000])
def test_evaluation_steps_rise_geometrically_to_the_budget(budget):
    steps = evaluation_steps(budget)
    assert steps[0] == 1 and steps[-1] == budget and steps == sorted(set(steps))
    assert all(after <= max(before + 1, 1.26 * before + 1) for before, after in zip(steps, steps[1:], strict=False))
    assert len(steps) < 50
