"""A classifier that knows its task is held to its answers, and of many weights the last stage trained, if nothing is
said."""

from __future__ import annotations

import pytest
import torch
from test_short_runs import rows, trained_resnet  # noqa: F401
from tiny_models import tiny_classifier
from transformers import ResNetConfig, ResNetForImageClassification

from hf_immunize import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.training.core.registry import terms_of
from hf_immunize.training.vision import held, rate
from hf_immunize.training.vision.judging import Measured, judge
from hf_immunize.training.vision.planning import plan_memory

OPEN = (None, None, None, None)
HELD = (5.0, 10.0, 6.0, "last:1")


def options(args):
    return args.strength, args.distillation, args.feature_distillation, args.trainable_modules


@pytest.fixture(autouse=True)
def small_counts_as_large(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(held, "LARGE", 5_000)


@pytest.fixture
def started(rows, tmp_path):  # noqa: F811
    def start(model, data=rows, **changed):
        args = ImmunizationConfig(str(tmp_path), **{
            "objective": "closed_form_adversary", "max_steps": 40, "report_to": "none", "disable_tqdm": True,
            "save_strategy": "no",
        } | changed)
        return ImmunizationTrainer(model=model, args=args, **data), args

    return start


@pytest.mark.parametrize("objective", ["closed_form_adversary", "condition_number"])
def test_forty_steps_with_nothing_else_set(started, rows, objective):  # noqa: F811
    model = trained_resnet(rows["train_dataset"], 0)
    trainer, args = started(model, objective=objective, max_primary_drop=1.0)
    assert options(trainer.args) == HELD and options(args) == OPEN
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert any("stages.0" in name for name in frozen) and not any("stages.1" in name for name in frozen)
    trainer.train()
    assert trainer.outcome.immunized, trainer.outcome.told
    assert trainer.guard_record.held


def test_what_the_user_named_stays(started, rows):  # noqa: F811
    model = trained_resnet(rows["train_dataset"], 0, steps=40)
    named = {"strength": 0.1, "distillation": 0.0, "feature_distillation": 0.0, "trainable_modules": ".*"}
    assert options(started(model, **named)[0].args) == tuple(named.values())
    assert all(weight.requires_grad for weight in model.parameters())
    assert started(model, distillation=1.0)[0].args.strength == 0.5  # held a tenth as hard
    assert started(model, weight="1")[0].args.strength == 0.5


def test_what_the_user_froze_stays(started, rows):  # noqa: F811
    model = trained_resnet(rows["train_dataset"], 0, steps=40)
    model.resnet.embedder.requires_grad_(False)
    trainer, _ = started(model)
    assert options(trainer.args) == (*HELD[:3], None)
    assert all(weight.requires_grad for weight in model.resnet.encoder.parameters())


@pytest.mark.parametrize("changed", [{"objective": "rep_noise"}, {"objective": "closed_form_adversary+trap"}])
def test_other_objectives_are_as_published(started, rows, changed):  # noqa: F811
    model = trained_resnet(rows["train_dataset"], 0, steps=40)
    assert options(started(model, **changed)[0].args) == (0.5, 0.0, 0.0, None)


def test_a_head_that_is_new_learns_from_labels(started):
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic", num_labels=5)
    model = ResNetForImageClassification(config)
    trainer, _ = started(model)
    assert options(trainer.args) == (0.5, 0.0, 0.0, None) and all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("wrong", [
    {"labels": 7}, {"labels": -1}, {"labels": None}, {"labels": [0, 1]}, {"labels": 0.5},
    {"pixel_values": torch.zeros(3, 5, 5)}, {"pixel_values": torch.zeros(16)},
])
def test_a_row_that_training_refuses_is_left_for_it_to_name(rows, wrong):  # noqa: F811
    model, good = trained_resnet(rows["train_dataset"], 0, steps=60), [rows["train_dataset"][row] for row in (0, 50)]
    assert held.knows_its_task(model, good)
    assert not held.knows_its_task(model, [*good, {**good[0], **wrong}])


class Renamed(torch.utils.data.Dataset):
    """Rows whose label is called ``label``, as in many tables of the Hub; it has no other attribute."""

    def __init__(self, held):
        self.rows = held

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        held = dict(self.rows[row])
        return {"pixel_values": held["pixel_values"], "label": held["labels"]}


def test_a_label_column_of_the_other_name_tells_as_well(started, rows):  # noqa: F811
    model = trained_resnet(rows["train_dataset"], 0)
    renamed = {name: Renamed(held) for name, held in rows.items()}
    assert options(started(model, data=renamed)[0].args) == HELD


def test_sites_before_the_last_stage_are_reached(started, rows):  # noqa: F811
    model = trained_resnet(rows["train_dataset"], 0)
    assert started(model, sites="resnet.encoder.stages.0")[0].args.trainable_modules is None


def test_below_the_line_every_layer_trains(started, rows, monkeypatch):  # noqa: F811
    model = trained_resnet(rows["train_dataset"], 0)
    monkeypatch.setattr(held, "LARGE", sum(weight.numel() for weight in model.parameters()) + 1)
    assert options(started(model)[0].args) == (5.0, 10.0, 0.0, None)
    assert options(started(model, distillation=1.0)[0].args) == (0.5, 1.0, 0.0, None)
    assert options(started(model, objective="group_kappa")[0].args) == (0.5, 0.0, 0.0, None)
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("line,times", [(5_000, 5), (10**9, 1.5)], ids=["features as well", "answers alone"])
def test_answers_that_are_held_may_change_more(started, rows, monkeypatch, line, times):  # noqa: F811
    monkeypatch.setattr(rate, "MOST", 1.0)
    monkeypatch.setattr(held, "LARGE", line)
    model = trained_resnet(rows["train_dataset"], 0)
    trainer, _ = started(model)
    looked = [rows["train_dataset"][row] for row in torch.linspace(0, len(rows["train_dataset"]) - 1, 8).round().int()]
    each = torch.tensor([rate.rate_of(model, [row]) for row in looked])
    assert each.max() > 1.2 * each.min()
    assert trainer.args.learning_rate == pytest.approx(times * float(each.log().mean().exp()), rel=0.06)


def test_the_memory_that_is_told_has_the_copy_of_the_model(tmp_path):
    def planned(**changed):
        with torch.device("meta"):
            model = tiny_classifier("vit")
        args = ImmunizationConfig(str(tmp_path), objective="closed_form_adversary", **changed)
        return plan_memory(model, args, (3, 16, 16))

    free = planned(distillation=0, feature_distillation=0, trainable_modules="last:1")
    assert planned().teacher > free.teacher == 0
    assert planned(trainable_modules=".*").gradients > planned().gradients


@pytest.mark.parametrize("held_out", [False, True])
def test_rows_that_were_trained_on_do_not_say_it_alone(held_out):
    """As measured on a MobileNetV2: a probe of rows seen fell to near chance, of others it lost nothing."""
    terms = terms_of("closed_form_adversary")
    before, after = (Measured({"harmful_adversary_r2": term}, probe) for term, probe in ((0.488, 0.362), (0.42, 0.171)))
    immunized, told = judge(before, after, 1 / 12, terms, "240 rows", held_out=held_out)
    assert immunized == held_out and ("says little" in told) != held_out
    after = Measured({"harmful_adversary_r2": 0.1}, 0.171)
    assert judge(before, after, 1 / 12, terms, "240 rows", held_out=held_out)[0]
