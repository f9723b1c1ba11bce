"""The trainer says whether it worked: before and after on the same harmful rows, in one line and in the record."""

from __future__ import annotations

import pytest
import torch
from transformers import EarlyStoppingCallback

from hf_immunize import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.linalg import ridge_accuracies
from hf_immunize.models import load_classifier
from hf_immunize.training.core.outcome import in_scale_free_terms
from hf_immunize.training.core.registry import OBJECTIVES, terms_of
from hf_immunize.training.core.terms import Term
from hf_immunize.training.vision.judging import Measured, judge
from hf_immunize.training.vision.outcome import pick_rows


@pytest.fixture
def digits(digits_primary, digits_base):
    primary, harmful, _ = digits_primary
    from hf_immunize.models import load_processor

    processor = load_processor(digits_base)
    return {
        "train_dataset": primary.pixels("train", processor), "harmful_dataset": harmful.pixels("defense", processor),
        "eval_dataset": primary.pixels("validation", processor),
        "harmful_eval_dataset": harmful.pixels("validation", processor),
    }


def run(digits, base, tmp_path, **options):
    settings = {"max_steps": 60, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    trainer = ImmunizationTrainer(
        model=load_classifier(base), args=ImmunizationConfig(str(tmp_path / "run"), **settings | options), **digits
    )
    trainer.train()
    return trainer


def test_an_objective_that_works_says_so_on_rows_it_has_not_seen(digits, digits_base, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="hf_immunize.training.core.guarded"):
        options = {"objective": "closed_form_adversary", "max_steps": 150, "strength": 0.1}
        found = run(digits, digits_base, tmp_path, **options).outcome
    assert found.held_out and found.rows == len(digits["harmful_eval_dataset"])
    assert found.probe_after < found.probe_before - 0.2 and found.probe_before > 0.6
    assert found.terms_after["harmful_adversary_r2"] < found.terms_before["harmful_adversary_r2"]
    assert found.told in caplog.text and "held-out harmful rows" in found.told


@pytest.mark.parametrize("length", [{"max_steps": 40}, {"max_steps": -1, "num_train_epochs": 3}], ids=["40", "epochs"])
@pytest.mark.parametrize("allowed", [None, 1.0])
def test_a_number_of_steps_or_epochs_alone_takes_the_probe_half_of_its_gain(
    digits, digits_base, tmp_path, length, allowed
):
    del digits["harmful_eval_dataset"]  # 300 rows tell it better than 94
    trainer = run(digits, digits_base, tmp_path, objective="closed_form_adversary", max_primary_drop=allowed, **length)
    assert trainer.outcome.immunized, trainer.outcome.told
    assert trainer.guard_record.drop <= 1.6  # three of 192 images, where nothing guards
    assert trainer.guard_record.held is (None if allowed is None else True)


LONG = ("imma", "rep_noise", "resalign_moreau", "sophon_ice", "sophon_klu", "tar_entropy", "trap")
"""Their losses have tests of their own; a whole run of each takes long."""


@pytest.mark.parametrize("objective", [
    pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in sorted(OBJECTIVES)])
def test_every_objective_is_measured_and_lowers_its_terms_by_default(digits, digits_base, tmp_path, objective):
    """Nothing set but objective, length and guard."""
    trainer = run(digits, digits_base, tmp_path, objective=objective, max_steps=40, max_primary_drop=1.0)
    found = trainer.outcome
    harmful = [term for term in trainer.terms if term.side == "harmful"]
    assert {term.name for term in harmful} <= set(found.terms_after)
    before, after = (sum(t.progress(of[t.name]) for t in harmful) for of in (found.terms_before, found.terms_after))
    assert trainer.guard_record.held
    if objective == "imma":  # in 40 steps it costs this small model more than a point at each evaluation
        assert after < before or trainer.guard_record.returned_step == 0
    else:
        assert after < before and (trainer.guard_record.returned_step > 0 or trainer.guard_record.towards_last)
    assert found.immunized is found.told.startswith("IMMUNIZED")
    if objective in ("condition_number", "ill_only", "opt_kappa", "group_kappa"):
        assert found.immunized and found.gradient_steps_after > 2 * found.gradient_steps_before


class _WithoutLabels(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return {"pixel_values": self.rows[row]["pixel_values"]}


@pytest.mark.slow
def test_images_without_labels_are_enough_for_a_simulated_attack_by_default(digits, digits_base, tmp_path):
    harmful = {name: _WithoutLabels(rows) for name, rows in digits.items() if name.startswith("harmful")}
    trainer = run(digits | harmful, digits_base, tmp_path, objective="simulated_attack", max_steps=40,
                  max_primary_drop=1.0)
    found, term = trainer.outcome, "harmful_simulated_attack"
    assert found.terms_after[term] < 0.7 * found.terms_before[term]
    assert found.immunized and trainer.guard_record.held and found.probe_before is None


def test_nothing_done_is_not_immunized_and_says_what_to_change(digits, digits_base, tmp_path):
    found = run(digits, digits_base, tmp_path, objective="closed_form_adversary", strength=0.0, max_steps=3,
                learning_rate=1e-9).outcome
    assert not found.immunized and found.told.startswith("NOT IMMUNIZED") and "raise strength" in found.told
    assert found.probe_after == pytest.approx(found.probe_before, abs=0.02)


def test_looking_changes_nothing_in_what_is_trained(digits, digits_base, tmp_path, monkeypatch):
    ours = run(digits, digits_base, tmp_path, max_steps=4).model.state_dict()
    monkeypatch.setattr("hf_immunize.training.vision.outcome.OutcomeMeter.start", lambda self, model: None)
    trainer = run(digits, digits_base, tmp_path, max_steps=4)
    assert trainer.outcome is None
    assert all(torch.equal(value, ours[name]) for name, value in trainer.model.state_dict().items())


def test_conditioning_says_whom_it_does_not_stop():
    terms = terms_of("condition_number")
    harmful = [term for term in terms if term.side == "harmful"]
    before, after = (Measured({"harmful_r_ill": value}, 0.8) for value in (1.0, 0.1))
    immunized, told = judge(before, after, 0.2, harmful, "harmful rows")
    assert immunized and "no others" in told and "80.0 -> 80.0 %" in told
    assert judge(after, before, 0.2, harmful, "harmful rows")[0] is False


def by_steps(first: int, top: float = 0.8) -> tuple[float, ...]:
    """Probes that are at chance (0.2) before the power of ten ``first``, and at the top from there on."""
    return tuple(0.2 if place < first else top for place in range(9))


@pytest.mark.parametrize("first, immunized, told", [
    (2, True, "3.16 -> 31.6 steps"), (1, False, "3.16 -> 3.16 steps"), (0, False, "3.16 -> 1 or fewer steps"),
    (9, True, "3.16 -> more than 1e+08 steps")])
def test_conditioning_has_to_slow_who_descends_the_raw_gradient(first, immunized, told):
    """The term fell in each case; half of the way from 0.2 to 0.8 is reached between two powers of ten."""
    harmful = [term for term in terms_of("group_kappa") if term.side == "harmful"]
    before = Measured({harmful[0].name: -5.0}, 0.8, by_steps(1))
    after = Measured({harmful[0].name: -9.0}, 0.8, by_steps(first))
    found = judge(before, after, 0.2, harmful, "harmful rows")
    assert found[0] is immunized and told in found[1], found[1]


@pytest.mark.parametrize("objective", ["condition_number", "ill_only"])
def test_features_that_are_only_larger_immunize_nobody(digits, digits_base, tmp_path, objective):
    """Twice the features and half of the head: the same answers, R_ill a sixteenth or so, and nobody is held up."""
    trainer = run(digits, digits_base, tmp_path, objective=objective, max_steps=1, learning_rate=1e-12)
    meter, model = trainer._outcome_meter, trainer.model
    meter.start(model)
    norm = model.get_submodule("vit.layernorm")
    with torch.no_grad():
        for values in (norm.weight, norm.bias):
            values.mul_(2)
        model.classifier.weight.div_(2)
    found = meter.record(model)
    assert found.terms_after["harmful_r_ill"] < 0.5 * found.terms_before["harmful_r_ill"]
    assert not found.immunized and found.gradient_steps_after == pytest.approx(found.gradient_steps_before, rel=0.05)


def test_a_run_that_destroyed_the_primary_task_is_no_success_and_says_so(digits, digits_base, tmp_path):
    trainer = run(digits, digits_base, tmp_path, objective="closed_form_adversary", strength=50.0, learning_rate=0.02)
    found = trainer.outcome
    assert trainer.guard_record.drop > 20 and found.probe_after < found.probe_before - 0.2
    assert not found.immunized and "The primary task was lost with it: set max_primary_drop" in found.told
    assert f"accuracy {trainer.guard_record.base:.2f} -> {trainer.guard_record.final:.2f} points" in found.told


def test_rows_that_cannot_be_measured_are_told_of(digits, digits_base, tmp_path, caplog):
    rows = digits["harmful_eval_dataset"]
    first = [rows.labels.tolist().index(label) for label in range(5)]
    held = torch.utils.data.Subset(rows, first)  # one row of each class
    with caplog.at_level("WARNING", logger="hf_immunize.training.vision.outcome"):
        found = run(digits | {"harmful_eval_dataset": held}, digits_base, tmp_path, max_steps=1)
    assert found.outcome is None and "NOT MEASURED: whether it worked cannot be said. expected" in caplog.text


def test_the_order_of_the_rows_does_not_matter_to_terms_on_groups(digits, digits_base, tmp_path):
    """Folders give rows class by class; batches of training mix them."""
    held, found = digits["harmful_eval_dataset"], {}
    by_class = torch.utils.data.Subset(held, held.labels.argsort().tolist())
    for name, rows in {"as they are": held, "by class": by_class}.items():
        trainer = run(digits | {"harmful_eval_dataset": rows}, digits_base, tmp_path / name, objective="group_kappa",
                      max_steps=1, learning_rate=1e-12)
        found[name] = trainer.outcome.terms_before["harmful_negative_group_log_kappa"]
    assert found["by class"] == pytest.approx(found["as they are"], abs=0.12)


def test_rows_that_were_trained_on_are_called_that(digits, digits_base, tmp_path):
    del digits["harmful_eval_dataset"]
    found = run(digits, digits_base, tmp_path, max_steps=2).outcome
    assert f"{found.rows} harmful rows it was trained on" in found.told and not found.held_out


WHOM = {
    "condition_number": "no others", "ill_only": "no others", "opt_kappa": "no others", "group_kappa": "no others",
    "closed_form_adversary": "the layers before them", "esd": "may bring it back", "meta_unlearning": "later steps",
    "imma": "a probe in closed form is another one",
    "rep_noise": "fine-tuning, go on", "trap": "more steps, or a closed form, go on",
}


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_success_says_what_it_means_and_whom_it_does_not_stop(objective):
    harmful = [term for term in terms_of(objective) if term.side == "harmful"]
    ends = ((1.0, 0.8), (0.1, 0.3))
    before, after = (Measured({term.name: value for term in harmful}, probe) for value, probe in ends)
    immunized, told = judge(before, after, 0.2, harmful, "rows")
    assert immunized and told.endswith(".") and WHOM.get(objective, "a probe in closed form is another one") in told


def test_objectives_together_say_each_and_a_term_of_ones_own_leaves_it_to_the_exam():
    terms = [term for term in terms_of("ill_only+group_kappa+rep_noise") if term.side == "harmful"]
    mine = Term("harmful_mine", "harmful", lambda rows, settings: rows.features.mean())
    before, after = (Measured({term.name: value for term in (*terms, mine)}, 0.8) for value in (1.0, 0.1))
    told = judge(before, after, 0.2, [*terms, mine], "rows")[1]
    assert told.count("no others") == 1 and "closer to noise" in told and "of your own" in told


@pytest.mark.parametrize("objective", ["opt_kappa", "group_kappa"])
@pytest.mark.parametrize("fall,immunized", [(0.3, True), (0.06, True), (0.04, False), (-0.3, False)])
def test_a_logarithm_has_to_fall_by_a_twentieth_of_what_it_speaks_of(objective, fall, immunized):
    """log kappa of 14 that rises by 0.3 is a kappa 1.35 times as large."""
    harmful = [term for term in terms_of(objective) if term.side == "harmful"]
    before, after = (Measured({harmful[0].name: value}, 0.8) for value in (-14.0, -14.0 - fall))
    assert judge(before, after, 0.2, harmful, "rows")[0] is immunized


@pytest.mark.parametrize("after,immunized", [(0.51, False), (0.49, True), (0.2, True)])
def test_a_probe_has_to_lose_half_of_its_gain(after, immunized):
    terms = terms_of("closed_form_adversary")
    before = Measured({"harmful_adversary_r2": 0.5}, 0.8)
    assert judge(before, Measured({"harmful_adversary_r2": 0.1}, after), 0.2, terms, "rows")[0] is immunized


@pytest.mark.parametrize("count,immunized", [(13, False), (54, True), (None, True)])
def test_so_few_rows_that_chance_does_it_say_nothing(count, immunized):
    """83 to 50 %: of 13 rows that is four, which a model that nobody immunized loses now and then."""
    terms = terms_of("closed_form_adversary")
    before, after = Measured({"harmful_adversary_r2": 0.6}, 0.833), Measured({"harmful_adversary_r2": 0.2}, 0.5)
    found, told = judge(before, after, 0.33, terms, "rows", count=count)
    assert found is immunized and ("too few to tell this from chance" in told) is not immunized


@pytest.mark.parametrize("fall,immunized", [(0.3, True), (0.2, False)])
def test_without_labels_the_condition_number_itself_has_to_grow_by_a_quarter(fall, immunized):
    terms = in_scale_free_terms(terms_of("condition_number"))
    harmful = {term.name: 1.0 for term in terms} | {"harmful_negative_log_kappa": -8.0}
    after = {name: 0.2 for name in harmful} | {"harmful_negative_log_kappa": -8.0 - fall}
    assert set(harmful) == {"harmful_r_ill", "harmful_negative_log_kappa"}
    assert judge(Measured(harmful, None), Measured(after, None), None, terms, "rows")[0] is immunized


@pytest.mark.parametrize("left,immunized", [(0.8, False), (0.7, True)])
def test_a_simulated_attacker_has_to_be_held_up_by_a_quarter(left, immunized):
    terms = [term for term in terms_of("simulated_attack") if term.side == "harmful"]
    before, after = (Measured({"harmful_simulated_attack": value}, 0.8) for value in (1.0, left))
    assert judge(before, after, 0.2, terms, "rows")[0] is immunized


def test_a_primary_task_that_nobody_looked_at_is_told(digits, digits_base, tmp_path):
    del digits["eval_dataset"]
    found = run(digits, digits_base, tmp_path, objective="closed_form_adversary", max_steps=2).outcome
    assert "the primary metric was not measured, which eval_dataset does" in found.told


def test_early_stopping_hears_of_the_evaluations_that_were_asked_for_alone(digits, digits_base, tmp_path, caplog):
    stopper = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = ImmunizationTrainer(
        model=load_classifier(digits_base), callbacks=[stopper], **digits,
        args=ImmunizationConfig(str(tmp_path / "run"), max_steps=12, use_cpu=True, report_to="none", disable_tqdm=True,
                                eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
                                load_best_model_at_end=True, metric_for_best_model="accuracy", learning_rate=1e-12))
    with caplog.at_level("WARNING"):
        trainer.train()
    assert trainer.state.global_step == 4 and "early stopping is disabled" not in caplog.text
    assert stopper in trainer.callback_handler.callbacks


def test_rows_are_picked_class_by_class():
    labels = [0] * 10 + [1] * 2 + [2] * 10
    assert pick_rows(labels, 6) == [0, 1, 10, 11, 12, 13]
    assert pick_rows(labels) == list(range(22))


@pytest.mark.parametrize("rows,width", [(40, 8), (12, 30)])
@pytest.mark.parametrize("horizon", [1.0, 1e3, 1e6])
def test_ridge_accuracies_are_those_of_a_solved_system(rows, width, horizon):
    generator = torch.Generator().manual_seed(rows)
    labels = torch.arange(rows) % 3
    centres = torch.randn(3, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    support, query = centres[labels] + noise
    phi, targets = support - support.mean(0), torch.nn.functional.one_hot(labels).double()
    penalty = torch.linalg.matrix_norm(phi, 2) ** 2 / horizon
    weights = torch.linalg.solve(phi.T @ phi + penalty * torch.eye(width), phi.T @ (targets - targets.mean(0)))
    answers = (query - support.mean(0)) @ weights + targets.mean(0)
    (found,) = ridge_accuracies(support, labels, query, labels, [horizon])
    assert float(found) == float((answers.argmax(1) == labels).double().mean())


def test_ridge_accuracies_of_collapsed_features_are_chance():
    labels = torch.arange(12) % 3
    point = torch.ones(12, 4)
    assert ridge_accuracies(point, labels, point, labels, [1.0, 1e8]).tolist() == pytest.approx([1 / 3, 1 / 3])
