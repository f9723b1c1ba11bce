"""Trials compared on some seeds, the best run on all: the same effort on both sides, and nothing hidden."""

import pytest
from trace_builders import side_of, trace

from hf_immunize.attacks import ATTACKS, AttackContext, count_runs, plan_runs, plan_trials, run_suite
from hf_immunize.attacks.core.finalists import finalists
from hf_immunize.certification.cells import build_cell
from hf_immunize.errors import ConfigError, IncompleteExamError
from hf_immunize.exam import PROTOCOLS, Rule
from hf_immunize.records import AttackTrace

TUNED = {"config": {"learning_rate": 0.1, "tuning_seeds": [0]}}


def tuned(role, best, steps=(10, 10, 10)):
    """Three trials on seed 0; ``best`` on all three, the others half as fast."""
    return [
        run for trial in ("a", "b", "c")
        for run in side_of(role, steps if trial == best else (2 * steps[0],), trial=trial, **TUNED)
    ]


def build(subject, control):
    return build_cell("lora", ATTACKS["lora"], {"subject": subject, "control": control}, 0.5, 200, Rule())


def test_each_side_may_choose_its_own_trial():
    cell = build(tuned("subject", "b", (60, 60, 60)), tuned("control", "c"))
    assert (cell.subject.trial, cell.control.trial) == ("b", "c")
    assert cell.subject.trials == cell.control.trials == 3 and cell.seeds == [0, 1, 2]
    assert cell.slow_down.samples == 3 and len(cell.subject.best_of_trials) == 3


@pytest.mark.parametrize("drop, message", [
    (lambda run: run.trial == "a", "got 1 missing on the subject, first a with seed 0"),
    # the last seed alone may be left out, where the others decide (test_curtailing.py)
    (lambda run: run.seed == 1, "expected every seed in every trial of lora, got b without seeds .1. on the subject"),
    (lambda run: run.seed == 0 and run.trial == "b", "1 missing on the subject, first b with seed 0"),
    (lambda run: run.seed > 0, "expected a trial of lora with all of the seeds .* on the subject, got none"),
])
def test_what_is_left_out_is_found(drop, message):
    with pytest.raises(IncompleteExamError, match=message):
        build([run for run in tuned("subject", "b") if not drop(run)], tuned("control", "c"))


def test_a_complete_trial_that_was_no_finalist_is_more_effort():
    twice = tuned("subject", "b") + [run for run in side_of("subject", (20, 20, 20), trial="c", **TUNED) if run.seed]
    with pytest.raises(IncompleteExamError, match=r"on the subject .* best on \[0\], \['b'\], got \['b', 'c'\]"):
        build(twice, tuned("control", "c"))


def curve(trial, scores, seed=0, outcome="completed"):
    points = [(step, score) for step, score in zip((1, 10, 100), scores, strict=True)]
    return trace(points, trial=trial, seed=seed, budget=100, outcome=outcome, **TUNED)


def test_the_fastest_and_the_furthest_go_on():
    fast, far, slow = curve("fast", (0.5, 0.6, 0.6)), curve("far", (0.1, 0.2, 0.7)), curve("slow", (0.1, 0.2, 0.6))
    assert finalists([slow, far, fast]) == ("fast", "far")
    assert finalists([slow, fast]) == ("fast",), "as far as the fastest is no reason to go on"
    assert finalists([slow, curve("fast", (0.5, 0.6, 0.9), outcome="diverged")]) == ("fast",), "what it kept counts"
    lost = trace([], trial="fast", seed=1, budget=100, outcome="diverged", **TUNED)
    others = [curve("fast", (0.5, 0.6, 0.9), seed) for seed in (0, 2)] + [curve("slow", (0.1, 0.2, 0.6), seed)
                                                                         for seed in (0, 1, 2)]
    assert finalists([lost, *others]) == ("fast",), "a run that diverges costs its seed, not its trial"


def test_the_trial_with_the_best_single_seed_goes_on_too():
    steady = [curve("steady", (0.5, 0.6, 0.6), seed) for seed in (0, 1, 2)]
    lucky = [curve("lucky", (0.1, 0.2, 0.9 if seed == 1 else 0.2), seed) for seed in (0, 1, 2)]
    assert finalists([*steady, *lucky]) == ("steady", "lucky")


def test_a_finalist_that_did_not_go_on_is_missed():
    fast = [curve("fast", (0.3, 0.4, 0.4), seed=seed) for seed in (0, 1, 2)]
    far = [curve("far", (0.1, 0.1, 0.7), seed=seed) for seed in (0, 1, 2)]
    control = [run.model_copy(update={"role": "control"}) for run in [*fast, *far]]
    with pytest.raises(IncompleteExamError, match=r"\['far', 'fast'\], got \['fast'\]"):
        build([*fast, far[0]], control)
    assert build([*fast, *far], control).subject.trial == "far", "the fastest never gets to the threshold"


def test_a_random_search_is_the_same_for_everybody_and_covers_every_value():
    attack = ATTACKS["full_finetune"]
    first, again = plan_trials(attack, None, 8), plan_trials(attack, None, 8)
    assert first == again and len({trial for _, trial in first}) == 8
    for name, values in (("learning_rate", 4), ("batch_size", 3), ("scheduler", 4), ("max_grad_norm", 2)):
        assert len({getattr(config, name) for config, _ in first}) == values
    rates = [config.learning_rate for config, _ in plan_trials(attack, None, 4)]
    assert sorted(rates) == [1e-5, 1e-4, 1e-3, 1e-2]
    ordinary = {config for config, _ in plan_trials(attack, {"steps": (7,)}, 4)} & {attack.config(steps=7)}
    assert ordinary, "what everybody would try first is always among the trials"
    fixed = [config for config, _ in plan_trials(attack, {"scheduler": ("linear", "cosine")}, 4)]
    assert {config.scheduler for config in fixed} <= {"linear", "cosine"}, "but what was chosen by hand stays"
    assert len(plan_trials(attack)) == 4 and {config.batch_size for config, _ in plan_trials(attack)} == {32}
    narrow = plan_trials(attack, {name: (getattr(attack.config(), name),) for name in (
        "batch_size", "scheduler", "warmup_steps", "weight_decay", "max_grad_norm")}, 50)
    assert len(narrow) == 4
    probes = ATTACKS["linear_probe_gd"]
    assert plan_trials(probes, None, 2) == plan_trials(probes)
    with pytest.raises(ConfigError, match="expected at least one trial, got 0"):
        plan_trials(attack, None, 0)


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_trial_names_of_every_preset_fit_a_file_name(name):
    from hf_immunize.attacks import parse_settings

    protocol = PROTOCOLS[name]
    settings = parse_settings(list(protocol.settings), ATTACKS)
    for attack in protocol.attacks:
        trials = plan_trials(ATTACKS[attack], settings.get(attack), protocol.trials)
        assert len({trial for _, trial in trials}) == len(trials)
        assert all(len(f"{attack}__{trial}__seed10.json") < 200 for _, trial in trials)


@pytest.fixture
def sit(tmp_path, trained_base, exam_data):
    data, splits = exam_data

    def run(role, folder, seeds=(0, 1, 2)):
        context = AttackContext(folder=trained_base, role=role, data=data.harmful, **splits)
        settings = {"full_finetune": {"steps": (3,)}, "linear_probe_gd": {"steps": (5,), "learning_rate": (1.0, 4.0)}}
        return run_suite(
            context, ATTACKS, list(settings), seeds, tmp_path / folder, settings, trials=3, tuning_seeds=1
        )

    return run


def test_a_suite_compares_on_some_seeds_and_runs_the_best_on_the_others(sit, tmp_path):
    summary = sit("subject", "one")
    attack = ATTACKS["full_finetune"]
    planned = plan_runs(attack, (0, 1, 2), {"steps": (3,)}, 3)
    assert count_runs(attack, planned, (0, 1, 2), 1) == 3 + 2
    traces = [AttackTrace.read(path) for path in (tmp_path / "one/traces/subject").glob("full_finetune*")]
    trials = {trial: sorted(run.seed for run in traces if run.trial == trial) for trial in {t.trial for t in traces}}
    chosen = finalists([run for run in traces if run.seed == 0])
    assert trials == {trial: [0, 1, 2] if trial in chosen else [0] for trial in trials} and len(trials) == 3
    assert summary.made == 6 + 3 + 2 * len(chosen)
    assert {tuple(run.config["tuning_seeds"]) for run in traces} == {(0,)}
    assert sit("subject", "one").made == 0
    lost = next(path for path in (tmp_path / "one/traces/subject").glob("full_finetune*seed2.json"))
    old = AttackTrace.read(lost).curve
    lost.unlink()
    assert sit("subject", "one").made == 1 and AttackTrace.read(lost).curve == old


@pytest.mark.slow
def test_a_suite_runs_every_finalist_on_the_other_seeds(sit, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hf_immunize.attacks.core.rounds.finalists", lambda traces: tuple(sorted({run.trial for run in traces})[:2])
    )
    assert sit("subject", "two").made == 6 + 3 + 2 * 2
    seeds = {}
    for path in (tmp_path / "two/traces/subject").glob("full_finetune*"):
        run = AttackTrace.read(path)
        seeds.setdefault(run.trial, set()).add(run.seed)
    assert [seeds[trial] for trial in sorted(seeds)] == [{0, 1, 2}, {0, 1, 2}, {0}]
