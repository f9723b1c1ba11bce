"""A forging campaign: consistent lies, with every hash rebuilt and, where a liar would, judged again by the real judge.

The exam is the preset ``quick`` on formulas. Only edits of traces, with everything else judged from them, pass
``--rejudge``; those are for ``--recheck`` to find (tests/certification/test_trials.py).
"""

import datetime
import json

import pytest
import record_builders as build
from forging import Exam, remembering, sha256_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from preset_exam import BREAKS, preset_exam

from hf_immunize.certification.primary_rows import judge_utility
from hf_immunize.exam import DIFFUSION_RULE
from hf_immunize.hub import Policy, verify_folder
from hf_immunize.records import Losses, UtilityRows

TOMORROW = datetime.date.today() + datetime.timedelta(days=1)
LATER = (TOMORROW + datetime.timedelta(days=180)).isoformat()
RULE = ("slow_down_factor", "threshold_share", "level", "max_utility_drop", "trainability_margin", "trainability_level")


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch, remembering(monkeypatch):
        yield Exam(preset_exam(tmp_path_factory.mktemp("forged")))


def copy_of(exam):
    return json.loads(json.dumps(exam.honest))


def test_the_honest_certificate_passes(exam):
    assert exam.honest["overall"] == "FAILS" and exam.unsound(copy_of(exam)) == []
    made, files = exam.judged()
    assert not files and exam.unsound(made) == []


# ---- what is written into the certificate alone


def cell(forged, attack):
    return next(item for item in forged["cells"] if item["attack"] == attack)


def say(forged, verdict="RESISTS"):
    """Every verdict written in, consistently."""
    for item in forged["cells"]:
        item["verdict"] = verdict
    for item in forged["families"]:
        item["verdict"] = verdict
    forged["overall"] = verdict


def moved_threshold(forged):
    cell(forged, "full_finetune")["threshold"] = 0.99


def reworded_rule(forged):
    forged["rule"] = forged["rule"].replace("at least 4", "at least 4.0")
    say(forged)


def rewritten_utility(forged):
    forged["utility"] |= {"base": 99.0, "immunized": 99.0, "drop": forged["utility"]["drop"] | {"high": 0.1}}


def not_applicable(forged):
    mine = cell(forged, "full_finetune")
    nothing = mine["slow_down"] | {"estimate": None, "low": None, "high": None, "samples": 0}
    mine |= {"verdict": "NOT APPLICABLE", "subject": None, "control": None, "seeds": [], "slow_down": nothing,
             "accuracy_drop": nothing, "relative_fine_tuning_deviation": nothing, "thresholds": [], "budgets": []}


def hidden(forged):
    """The attacks that break the model are taken out everywhere."""
    for name in BREAKS:
        forged["cells"] = [item for item in forged["cells"] if item["attack"] != name]
        forged["planned"] = [item for item in forged["planned"] if item != name]
        forged["plan"]["planned"] = [item for item in forged["plan"]["planned"] if item != name]
        forged["plan"]["attacks"] = [item for item in forged["plan"]["attacks"] if item["attack"] != name]
        forged["traces"] = {path: digest for path, digest in forged["traces"].items() if f"/{name}__" not in path}
    for item in forged["families"]:
        item["attacks"] = [name for name in item["attacks"] if name not in BREAKS]
        item["verdict"] = "RESISTS"
    forged["families"] = [item for item in forged["families"] if item["attacks"]]
    forged["overall"] = "RESISTS"


def without(*path):
    def change(forged):
        place = forged
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = None

    return change


def writing(value, *path):
    def change(forged):
        place = forged
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


WRITTEN = {
    "every verdict": say, "a threshold": moved_threshold, "the rule's words and every verdict": reworded_rule,
    "utility": rewritten_utility, "an attack that does not apply": not_applicable, "hidden attacks": hidden,
    "no rule": without("judged_by"), "no plan": without("plan"), "no answers": writing({}, "utility_rows"),
    "a statement": writing("Nobody breaks it.", "statement"), "nothing left to run": writing([], "not_run"),
    "a larger exam": writing("standard", "protocol"), "its threshold's words": writing("80 %", "threshold_rule"),
    "a later expiry": writing("2099-01-01", "expires"), "the ratio": writing(1e9, "immunization_ratio"),
    "the ratio's parts": writing({"harmful": 9.0, "primary": 1.0}, "immunization_ratio_parts"),
    "trainability": writing("EQUIVALENT", "trainability", 0, "reason"),
    "trainability's margin": writing(0.5, "trainability", 0, "margin"),
    "no trainability": writing([], "trainability"), "another metric": writing("robustness", "harmful_metric"),
    "a rule of the future": writing(99, "judged_by", "version"),
    "more test rows": writing(40_000, "harmful_data", 2, "rows"),
    "other rows": writing("f" * 64, "harmful_data", 2, "sha256"),
    "more primary rows": writing(9999, "primary_data", 0, "rows"),
    "the base as subject": lambda forged: forged["subject"].update(weights=forged["control"]["weights"]),
    "another size": writing(7, "subject", "parameters"),
    "another architecture": writing("X", "control", "architecture"),
    "fewer attacks in the plan": lambda forged: forged["plan"]["attacks"].pop(),
    "fewer planned": lambda forged: forged["plan"]["planned"].pop(),
    "other seeds": writing([0], "plan", "seeds"), "other settings": writing([], "plan", "settings"),
    "fewer trials": writing(1, "plan", "trials"), "other tuning seeds": writing(7, "plan", "tuning_seeds"),
    "a threshold in the plan": writing(0.99, "plan", "threshold"),
    "no benign methods": writing([], "plan", "trainability"),
    "no references": writing([], "plan", "references"),
    "a reference's family": writing("linear probing", "plan", "references", 0, "family"),
    "a smaller budget": writing(1, "plan", "attacks", 0, "budget"),
    "a trial less beyond the range": writing([], "plan", "attacks", 1, "widened"),
    "other margins": writing(9.0, "plan", "adaptation", "margin"),
    "effort of its own": writing(None, "plan", "adaptation"),
    "a budget that follows nothing": writing(False, "plan", "attacks", 1, "adapts"),
    "a budget on the way": writing([1, 2], "plan", "attacks", 1, "budgets"),
    "a family of its own": writing("unheard of", "plan", "attacks", 0, "family"),
    "no name of the score": writing("", "harmful_metric"), "half its name": writing("acc", "harmful_metric"),
    "no configuration": writing({}, "files"), "another configuration": writing("0" * 64, "files", "config.json"),
    "primary data that nobody answered": lambda forged: forged["primary_data"].append(
        forged["primary_data"][0] | {"source": "ImageNet", "rows": 50_000, "sha256": "e" * 64}),
    "a younger exam": lambda forged: (forged["provenance"].update(created=f"{TOMORROW}T00:00:00+00:00"),
                                      forged.update(expires=LATER)),
    "another measure of utility": lambda forged: forged["utility"].update(metric="robust accuracy"),
    "a further utility": lambda forged: forged["further_utility"].append(forged["utility"]),
    "a reference that was not run": lambda forged: forged["plan"]["references"].append(
        forged["plan"]["references"][0] | {"attack": "oracle"}),
    "a benign method that was not run": lambda forged: forged["plan"]["methods"].append(
        forged["plan"]["methods"][0] | {"attack": "benign_prayer"}),
    "no benign rows": writing([], "benign_data"), "the splits turned round": lambda forged: forged[
        "harmful_data"].reverse(),
    "a trace of nobody": lambda forged: forged["traces"].update({"traces/subject/lora__x__seed9.json": "0" * 64}),
    "traces of one side": lambda forged: [forged["traces"].pop(name) for name in [*forged["traces"]]
                                          if "/control/lora" in name],
    "a schema of the future": writing(2, "schema_version"), "a field of its own": writing("yes", "approved"),
    **{f"rule.{name}": writing(0.123, "judged_by", name) for name in RULE},
}


@pytest.mark.parametrize("lie", WRITTEN)
def test_what_is_written_into_the_certificate_is_unsound(exam, lie):
    forged = copy_of(exam)
    WRITTEN[lie](forged)
    assert forged != exam.honest and exam.unsound(forged), lie


# ---- what a liar lets the judge work out


def rows_of(exam, **changes):
    name = next(iter(exam.honest["utility_rows"]))
    rows = UtilityRows.read(exam.folder / name)
    return name, rows.model_copy(update=changes)


def judged_by_another_rule(exam, name, value):
    return exam.judged(rule=exam.certificate.judged_by.model_copy(update={name: value}))


def plan_with(exam, **changes):
    return exam.certificate.plan.model_copy(update=changes)


def only(*attacks):
    return lambda trace: trace.attack not in attacks


def dropping(exam, *attacks):
    """Attacks taken out of traces and plan, the rest judged."""
    plan = exam.certificate.plan
    return exam.judged(keep=only(*attacks), plan=plan.model_copy(update={
        "planned": [name for name in plan.planned if name not in attacks],
        "threshold": 0.68 if "ridge_probe" in attacks else None,  # which the reference attack would have set
        "attacks": [item for item in plan.attacks if item.attack not in attacks]}))


def best_trials_away(exam, attack):
    worst = sorted({trace.trial for trace in exam.traces().values() if trace.attack == attack})[-1]
    return exam.judged(keep=lambda trace: trace.attack != attack or trace.trial == worst)


def seeds_away(exam):
    return exam.judged(keep=lambda trace: trace.seed != 2)


def other_config(exam, attack, **changes):
    return exam.judged(lambda trace: trace.model_copy(update={"config": trace.config | changes})
                       if trace.attack == attack else trace)


def renamed_trial(exam, attack):
    """The trial that wins is said to have been another one."""
    def change(trace):
        return trace if trace.attack != attack else trace.model_copy(update={"trial": f"{trace.trial},luck=1"})

    made, files = exam.judged(change)
    return made, files


def other_rows(exam):
    more = [part.model_copy(update={"rows": 40_000}) for part in exam.certificate.harmful_data]
    return exam.judged(harmful_data=more)


def flattering_answers(exam):
    """Utility from answers of more rows than the data has."""
    name, rows = rows_of(exam)
    many = rows.model_copy(update={"answers": rows.answers.model_copy(update={
        key: value * 9 for key, value in rows.answers.model_dump().items()})})
    made, files = exam.judged(utility=judge_utility(many), utility_rows={name: sha256_of(many.dumps().encode())})
    return made, files | {name: many.dumps().encode()}


def answers_of_another(exam, side):
    name, rows = rows_of(exam, **{side: {"model.safetensors": "0" * 64}})
    made, files = exam.judged(utility_rows={name: sha256_of(rows.dumps().encode())})
    return made, files | {name: rows.dumps().encode()}


def base_as_subject(exam):
    """The plain base's weights under another model's certificate, hashes replaced."""
    control = exam.certificate.control
    subject = exam.certificate.subject.model_copy(update={"weights": control.weights})
    made, files = exam.judged(
        lambda trace: trace if trace.role == "control" else trace.model_copy(update={"model": subject}),
        subject=subject)
    return made | {"overall": "RESISTS"}, files


def renamed_measure(exam):
    """A measure of its own, whose rows nobody counts: ten that it answers."""
    name, rows = rows_of(exam)
    few = {key: [1] * 10 for key in rows.answers.model_dump()}
    other = rows.model_copy(update={"metric": "top-1 accuracy",
                                    "answers": rows.answers.model_copy(update=few)})
    data = other.dumps().encode()
    made, files = exam.judged(utility=judge_utility(other), utility_rows={name: sha256_of(data)})
    return made, files | {name: data}


def losses_for_answers(exam):
    """Losses, of which nobody counts the classes, under the name of accuracy."""
    name, rows = rows_of(exam)
    count = len(rows.answers.wanted)
    other = rows.model_copy(update={"answers": None, "losses": Losses(
        energy=[1.0] * count, base=[0.1] * count, immunized=[0.1 + 0.001 * (row % 2) for row in range(count)])})
    data = other.dumps().encode()
    made, files = exam.judged(utility=judge_utility(other), utility_rows={name: sha256_of(data)})
    return made, files | {name: data}


def added_runs(exam, change, chosen, **judged):
    """Runs copied under other names, as if they had been made."""
    more = {}
    for trace in exam.traces().values():
        if chosen(trace):
            copied = change(trace)
            more[f"traces/{copied.role}/{copied.file_name}"] = copied
    return exam.judged(more=more, **judged)


def lucky_seeds(exam):
    """One more seed, not the next one but one that suited the model."""
    return added_runs(exam, lambda trace: trace.model_copy(update={"seed": 40}),
                      lambda trace: trace.attack == "lora" and trace.seed == 4)


def oracle(exam):
    """An attacker without the model who is nearly as good as one with it: the threshold rises."""
    about = exam.certificate.plan.references[0]
    return added_runs(
        exam, lambda trace: trace.model_copy(update={"attack": "oracle", "curve": [
            point.model_copy(update={"validation": 0.8, "test": 0.8}) for point in trace.curve]}),
        lambda trace: trace.attack == about.attack and trace.trial.endswith("0.1,features=centered"),
        plan=plan_with(exam, references=[*exam.certificate.plan.references,
                                         about.model_copy(update={"attack": "oracle"})]))


def alternatives(exam):
    """Another public model, said to be nearly as good as the base: its runs are those of the base, a little worse."""
    return added_runs(
        exam, lambda trace: trace.model_copy(update={
            "role": "alternative", "model": build.other_model(trace.model), "curve": [
            point.model_copy(update={"validation": 0.9 * point.validation, "test": 0.9 * point.test})
            for point in trace.curve]}), lambda trace: trace.role == "control" and trace.attack == "lora")


def cut_short(trace):
    """A run whose last evaluations are gone, and with them what it reached."""
    if trace.attack != "lora" or len(trace.curve) < 4:
        return trace
    curve = trace.curve[:4]
    return trace.model_copy(update={"curve": curve, "budget": curve[-1].step})


def stopped(trace):
    return trace if trace.attack != "lora" else trace.model_copy(update={"curve": trace.curve[:4]})


def beyond(trace):
    """A control that learns more than everything."""
    if trace.attack != "lora" or trace.role != "control":
        return trace
    return trace.model_copy(update={"curve": [point.model_copy(update={"test": 1.5}) for point in trace.curve]})


def costly(trace):
    """A run of few steps that says it has seen as many rows as an attack has to cost."""
    return trace if trace.attack != "lora" else trace.model_copy(update={"samples": 400 * trace.budget})


def compared_elsewhere(exam):
    """Trials compared on the seed that suits the model."""
    return exam.judged(lambda trace: trace if "tuning_seeds" not in trace.config else trace.model_copy(
        update={"config": trace.config | {"tuning_seeds": [4]}, "seed": {0: 4, 4: 0}.get(trace.seed, trace.seed)}),
        renamed=True)


JUDGED = {
    **{f"rule.{name}={value:g}": (lambda exam, name=name, value=value: judged_by_another_rule(exam, name, value))
       for name, value in (("slow_down_factor", 1.0), ("slow_down_factor", 0.1), ("threshold_share", 0.999),
                           ("threshold_share", 1.1), ("max_utility_drop", 90.0), ("trainability_margin", 0.9),
                           ("level", 0.1), ("trainability_level", 0.1), ("valid_days", 3000))},
    "rule.budget_shares": lambda exam: judged_by_another_rule(exam, "budget_shares", (0.001,)),
    "rule.threshold_multiples": lambda exam: judged_by_another_rule(exam, "threshold_multiples", ()),
    "a threshold by hand": lambda exam: exam.judged(plan=plan_with(exam, threshold=0.99)),
    "a lower threshold by hand": lambda exam: exam.judged(plan=plan_with(exam, threshold=0.1)),
    "without what breaks it": lambda exam: dropping(exam, *BREAKS),
    "without one that breaks it": lambda exam: dropping(exam, "full_finetune"),
    "without any but probes": lambda exam: dropping(exam, "full_finetune", "lora"),
    "runs of one attack away": lambda exam: exam.judged(keep=only("full_finetune"), plan=plan_with(
        exam, planned=[name for name in exam.certificate.plan.planned if name != "full_finetune"])),
    "the best trials of full_finetune away": lambda exam: best_trials_away(exam, "full_finetune"),
    "the best trials of lora away": lambda exam: best_trials_away(exam, "lora"),
    "the best trials of a probe away": lambda exam: best_trials_away(exam, "linear_probe_adam"),
    "a seed away": seeds_away,
    "a starved budget": lambda exam: other_config(exam, "full_finetune", steps=1),
    "a rate that learns nothing": lambda exam: other_config(exam, "full_finetune", learning_rate=1e-12),
    "a hopeless penalty": lambda exam: other_config(exam, "ridge_probe", penalty=1e9),
    "a hopeless optimiser": lambda exam: other_config(exam, "lora", rank=0),
    "trials under other names": lambda exam: renamed_trial(exam, "full_finetune"),
    "more test rows": other_rows, "more primary rows than there are": flattering_answers,
    "answers of another model": lambda exam: answers_of_another(exam, "subject"),
    "answers of another base": lambda exam: answers_of_another(exam, "control"),
    "the base's weights": base_as_subject,
    "benign runs away": lambda exam: exam.judged(keep=lambda trace: not trace.attack.startswith("benign_"),
                                                 plan=plan_with(exam, methods=[], trainability=[])),
    "fewer benign methods": lambda exam: exam.judged(keep=only("benign_lora")) ,
    "the plan's seeds": lambda exam: exam.judged(plan=plan_with(exam, seeds=[0])),
    "the plan's settings": lambda exam: exam.judged(plan=plan_with(exam, settings=["lora.steps=1"])),
    "the plan's trials": lambda exam: exam.judged(plan=plan_with(exam, trials=1)),
    "a larger exam's name": lambda exam: exam.judged(plan=plan_with(exam, protocol="standard")),
    "a name of its own": lambda exam: exam.judged(plan=plan_with(exam, protocol="gold standard")),
    "a measure of its own": renamed_measure, "losses for answers": losses_for_answers,
    "seeds that were lucky": lucky_seeds, "an attacker who knows it anyway": oracle,
    "another public model": alternatives,
    "a budget cut short": lambda exam: exam.judged(cut_short), "runs that stopped": lambda exam: exam.judged(stopped),
    "more rows than steps": lambda exam: exam.judged(costly),
    "a base that learns too well": lambda exam: exam.judged(beyond),
    "trials compared elsewhere": compared_elsewhere,
    "few rows for an attacker": lambda exam: other_config(exam, "lora", attack_fraction=0.01),
    "attackers without a model who hold one": lambda exam: exam.judged(
        lambda trace: trace if trace.role != "nothing" else trace.model_copy(
            update={"model": exam.certificate.control})),
    "fewer attackers without a model": lambda exam: exam.judged(keep=only("pixel_network"), plan=plan_with(
        exam, references=[item for item in exam.certificate.plan.references if item.attack != "pixel_network"])),
    "starved attackers without a model": lambda exam: other_config(exam, "pixel_network", hidden=1),
    "a rule without references": lambda exam: exam.judged(
        plan=plan_with(exam, protocol="custom"), rule=DIFFUSION_RULE.model_copy(update={"gain": False})),
    "traces of another score": lambda exam: other_config(exam, "lora", metric="something on some images"),
}


@pytest.mark.parametrize("lie", JUDGED)
def test_what_a_liar_chooses_for_the_judge_is_unsound_and_named(exam, lie):
    made, files = JUDGED[lie](exam)
    if lie == "fewer benign methods":
        assert made["trainability"] != exam.honest["trainability"]
        assert any(item["verdict"] == "NOT RUN" for item in made["trainability"]), "which is no lie: it says so"
        return
    assert made != exam.honest and exam.unsound(made, files), lie


def test_how_many_there_are():
    assert len(WRITTEN) + len(JUDGED) - 1 >= 100


# ---- chosen by chance

FREE = {"provenance", "spectra", "source", "role", "revision", "schema_version", "name"}
"""What no verdict depends on: where and when, names, spectra that only explain, and what other checks are for."""


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in FREE:
                yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and value:
        for key, inner in enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path


def changed(value, chance):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + chance.choice([1, -1, 10, 1000])
    if isinstance(value, float):
        return value * chance.choice([0.5, 0.9, 1.1, 2]) + chance.choice([0.01, -0.01])
    if isinstance(value, str):
        return chance.choice([verdict for verdict in ("RESISTS", "EQUIVALENT", "") if verdict != value] + [value + "x"])
    return chance.choice([0.5, 3, "x"]) if value is None else [7]


def edit_any_field(exam, data):
    forged = copy_of(exam)
    chance = data.draw(st.randoms(use_true_random=False))
    paths = sorted(leaves(exam.honest), key=str)
    for path in data.draw(st.lists(st.sampled_from(paths), min_size=1, max_size=3, unique=True)):
        writing(changed(value_at(exam.honest, path), chance), *path)(forged)
    if forged != exam.honest:
        assert exam.unsound(forged)


CHANCE = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=12, **CHANCE)
@given(data=st.data())
def test_any_field_that_a_verdict_rests_on_may_not_be_edited(exam, data):
    edit_any_field(exam, data)


@pytest.mark.slow
@settings(max_examples=400, **CHANCE)
@given(data=st.data())
def test_no_field_that_a_verdict_rests_on_may_be_edited(exam, data):
    edit_any_field(exam, data)


def value_at(value, path):
    for step in path:
        value = value[step]
    return value


# ---- what passes, and is for a recheck to find


@settings(max_examples=2, **CHANCE)
@given(share=st.floats(0.1, 0.5), attack=st.sampled_from(("full_finetune", "lora", "ridge_probe")))
def test_traces_that_were_made_up_pass_which_is_why_there_is_a_recheck(exam, share, attack):
    def flatten(trace):
        if trace.attack != attack or trace.role != "subject":
            return trace
        return trace.model_copy(update={"curve": [point.model_copy(update={
            "test": share * point.test, "validation": share * point.validation}) for point in trace.curve]})

    made, files = exam.judged(flatten)
    assert files and exam.unsound(made, files) == []


def test_an_exam_of_ones_own_is_no_preset_which_is_noted_and_no_policy_on_presets_takes_it(exam):
    """Who leaves attacks out and says so has told no lie; the name of the preset is gone."""
    made, files = exam.judged(plan=plan_with(exam, protocol="custom"))
    with exam.told(made, files):
        found = verify_folder(exam.folder, rejudge=True)
        asked = verify_folder(exam.folder, policy=Policy(exam="quick"))
    assert found.sound and "custom" in {item.code for item in found.findings}
    assert any("'custom'" in item.message for item in asked.findings if item.level == "policy")


def test_a_configuration_that_is_not_the_bases_is_noted(exam):
    """The same weights under another epsilon are another network to fine-tune."""
    base = exam.certificate.control.model_copy(update={"configuration": "0" * 64})
    subject = exam.certificate.subject.model_copy(update={"configuration": "1" * 64})
    models = {"control": base, "subject": subject}

    def codes(**given):
        made, files = exam.judged(lambda trace: trace if trace.role not in given else trace.model_copy(
            update={"model": given[trace.role]}), **given)
        with exam.told(made, files):
            return {item.code for item in verify_folder(exam.folder, rejudge=True).findings}

    assert "configuration" in codes(**models)
    assert "configuration" not in codes(control=base, subject=subject.model_copy(update={"configuration": "0" * 64}))
