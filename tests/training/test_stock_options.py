"""Options of the stock Trainer: each row of the table in docs/training.md."""

from __future__ import annotations

import inspect
import json
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback

from hf_immunize.data import collate_pixels
from hf_immunize.errors import ConfigError, DataError, PublishRefusedError, RecordError
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.training.vision.identity import digest_data
from hf_immunize.training.vision.metrics import accuracy, bit_accuracy, metrics_of, r2
from hf_immunize.training.vision.primary import MULTI, REGRESSION, SINGLE


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def build(tmp_path, make_vit, make_pixels):
    def made(options=None, **words):
        settings = {"max_steps": 4, "per_device_train_batch_size": 8, "per_device_harmful_batch_size": 12, "seed": 7,
                    "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        words = {"model": make_vit(), "train_dataset": make_pixels(24), "eval_dataset": make_pixels(12, seed=2),
                 "harmful_dataset": make_pixels(30, seed=1)} | words
        args = ImmunizationConfig(str(tmp_path / "run"), **settings | (options or {}))
        return ImmunizationTrainer(args=args, **words)

    return made


def test_images_to_predict_may_have_no_labels(build, make_pixels):
    trainer, rows = build(), make_pixels(12, seed=2)
    told = trainer.predict(rows)
    unlabelled = Dataset.from_list([{"pixel_values": rows[row]["pixel_values"].tolist()} for row in range(len(rows))])
    found = trainer.predict(unlabelled.with_format("torch"))
    assert found.label_ids is None and "test_accuracy" in told.metrics and "test_accuracy" not in found.metrics
    assert found.predictions == pytest.approx(told.predictions, abs=1e-6)
    with pytest.raises(DataError, match="expected a 'labels' column"):
        trainer.evaluate(unlabelled.with_format("torch"))


def test_load_best_model_at_end_returns_the_best_step_and_the_record_names_it(build):
    options = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps",
               "eval_steps": 1, "metric_for_best_model": "score", "greater_is_better": True, "learning_rate": 1e-2}
    seen = []

    def score(prediction):
        seen.append(1)
        return accuracy(prediction) | {"score": -len(seen)}

    trainer = build(options, compute_metrics=score)
    trainer.train()
    assert trainer.state.best_global_step == trainer.saved_step == trainer.guard_record.returned_step == 1
    whole = build({**options, "load_best_model_at_end": False}, compute_metrics=score)
    whole.train()
    assert not same(weights(trainer.model), weights(whole.model))


def test_without_a_choice_the_saved_step_is_the_last_and_with_a_guard_its_choice(build):
    plain = build()
    plain.train()
    assert plain.saved_step == 4
    guarded = build({"max_primary_drop": 100.0, "eval_steps": 2})
    guarded.train()
    assert guarded.saved_step == guarded.guard_record.returned_step > 0


@pytest.mark.parametrize("chooser", [{"max_primary_drop": 1.0}, {"ema_decay": 0.9}])
def test_choosing_the_best_step_beside_a_guard_or_an_average_is_refused(build, chooser):
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps",
            "eval_steps": 1}
    with pytest.raises(ConfigError, match="Turn load_best_model_at_end off"):
        build(best | chooser)


def test_a_compute_metrics_of_ones_own_is_what_is_evaluated_and_guarded(build):
    trainer = build({"max_primary_drop": 50.0, "guard_metric": "mine"}, compute_metrics=lambda _: {"mine": 0.75})
    trainer.train()
    assert trainer.guard_record.base == 75.0 and trainer.evaluate()["eval_mine"] == 0.75


def test_several_evaluation_sets_are_guarded_by_the_name_of_one(build, make_pixels):
    sets = {"near": make_pixels(12, seed=2), "far": make_pixels(12, seed=3)}
    trainer = build({"max_primary_drop": 100.0, "guard_metric": "far_accuracy"}, eval_dataset=sets)
    trainer.train()
    assert {"eval_near_accuracy", "eval_far_accuracy"} <= set(trainer.evaluate())
    assert trainer.guard_record.metric == "far_accuracy" and trainer.guard_record.held
    with pytest.raises(ConfigError, match="set guard_metric"):
        build({"max_primary_drop": 100.0}, eval_dataset=sets).train()


def test_evaluating_batch_by_batch_gives_the_numbers_of_all_at_once(build, make_vit):
    model = make_vit()
    found = [build({"batch_eval_metrics": on, "per_device_eval_batch_size": 5}, model=model).evaluate()["eval_accuracy"]
             for on in (False, True)]
    assert found[0] == found[1]
    with pytest.raises(ConfigError, match="compute_result"):
        build({"batch_eval_metrics": True}, compute_metrics=accuracy)


@pytest.mark.parametrize("kind,whole", [(SINGLE, accuracy), (MULTI, bit_accuracy), (REGRESSION, r2)])
def test_a_metric_of_batches_is_the_metric_of_all_rows(kind, whole):
    from transformers import EvalPrediction

    generator = np.random.default_rng(0)
    outputs = generator.normal(size=(11, 3))
    labels = {SINGLE: generator.integers(0, 3, 11), MULTI: generator.integers(0, 2, (11, 3)), REGRESSION: outputs + 1}
    metric = metrics_of(kind)
    assert "compute_result" in inspect.signature(metric).parameters
    for _ in range(2):  # nothing is left over from the last evaluation
        parts = [(0, 4), (4, 7), (7, 11)]
        for start, end in parts:
            batch = EvalPrediction(predictions=outputs[start:end], label_ids=labels[kind][start:end])
            found = metric(batch, compute_result=end == 11)
        assert found == whole(EvalPrediction(predictions=outputs, label_ids=labels[kind]))


def test_label_smoothing_is_of_the_primary_loss_alone(build, make_vit):
    logged = []
    for factor in (0.0, 0.3):
        trainer = build({"label_smoothing_factor": factor, "learning_rate": 0.0, "logging_steps": 1, "max_steps": 1})
        trainer.train()
        logged.append(next(entry for entry in trainer.state.log_history if "primary_loss" in entry))
    assert logged[0]["primary_loss"] != logged[1]["primary_loss"]
    assert logged[0]["harmful_r_ill"] == logged[1]["harmful_r_ill"]


class Numbers(torch.utils.data.Dataset):
    """Images with three numbers each, for a regression head."""

    def __init__(self, rows):
        self.labels = torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return {"pixel_values": torch.full((3, 8, 8), float(row)), "labels": self.labels[row]}


class MixUp:
    """Half of each image and label is another row's; labels are soft."""

    def __call__(self, rows):
        batch = collate_pixels(rows)
        labels = torch.nn.functional.one_hot(batch["labels"], 3).float()
        return {"pixel_values": (batch["pixel_values"] + batch["pixel_values"].roll(1, 0)) / 2,
                "labels": (labels + labels.roll(1, 0)) / 2}


def soft_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs["logits"], labels)


@pytest.mark.parametrize("weight", ["1", "auto"])
def test_a_collator_that_mixes_never_touches_harmful_rows(build, caplog, weight, make_pixels):
    trainer = build({"weight": weight, "remove_unused_columns": False}, data_collator=MixUp(),
                    compute_loss_func=soft_loss)
    rows = trainer._streams["harmful"].batch(0)
    harmful = make_pixels(30, seed=1).pixel_values
    assert rows["labels"].dtype == torch.long
    assert all(any(torch.equal(image, own) for own in harmful) for image in rows["pixel_values"])
    with caplog.at_level("WARNING", logger="hf_immunize.training.vision.collators"):
        trainer.train()
    assert trainer.outcome.rows == 30


def test_a_collator_that_leaves_labels_alone_serves_harmful_rows_too(build):
    def brighter(rows):
        batch = collate_pixels(rows)
        return batch | {"pixel_values": batch["pixel_values"] + 100}

    assert float(build(data_collator=brighter)._streams["harmful"].batch(0)["pixel_values"].mean()) > 90


@pytest.mark.parametrize(
    "options,message",
    [
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"torch_compile": True}, "torch_compile off"),
        ({"push_to_hub": True, "hub_strategy": "checkpoint", "hub_model_id": "me/it"}, "hub_strategy"),
        ({"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_model_id": "me/it"}, "hub_strategy"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(build, options, message):
    with pytest.raises(ConfigError, match=message):
        build(options)


def test_what_is_pushed_has_passed_the_gate(build, monkeypatch):
    """With the strategies that are left training touches no network, and a push without a certificate is refused."""
    def no_network(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    for strategy in ("end", "every_save"):
        trainer = build({"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": "me/it", "max_steps": 1,
                         "save_strategy": "steps", "save_steps": 1})
        trainer.train()
        trainer.save_model()
        with pytest.raises(PublishRefusedError, match="certificate"):
            trainer.push_to_hub()


def test_sequential_sampling_takes_primary_rows_in_their_order(build, make_pixels):
    """Harmful rows are drawn as always."""
    rows = make_pixels(24)
    trainer = build({"train_sampling_strategy": "sequential"}, train_dataset=rows)
    for batch, start in zip(trainer.get_train_dataloader(), (0, 8, 16), strict=True):
        assert torch.equal(batch["pixel_values"], rows.pixel_values[start : start + 8])
    harmful = trainer._streams["harmful"].batch(0)["pixel_values"]
    assert torch.equal(harmful, build()._streams["harmful"].batch(0)["pixel_values"])


def test_label_smoothing_of_a_head_without_single_labels_is_refused(build, make_vit):
    model = make_vit()
    model.config.problem_type = "regression"
    with pytest.raises(ConfigError, match="label_smoothing_factor=0"):
        build({"label_smoothing_factor": 0.1}, model=model, train_dataset=Numbers(24), eval_dataset=Numbers(12))


def test_report_to_gets_terms_and_outcome(build):
    told = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.append(dict(logs))

    build({"logging_steps": 1}, callbacks=[Tracker()]).train()
    names = {name for logs in told for name in logs}
    assert {"harmful_r_ill", "primary_loss", "strength", "harmful_probe"} <= names


def test_a_checkpoint_of_weights_alone_is_not_resumed_as_if_it_were_whole(build, tmp_path):
    build({"save_strategy": "steps", "save_steps": 2, "save_only_model": True}).train()
    with pytest.raises(RecordError, match="save_only_model"):
        build({"save_strategy": "steps"}).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2}


def test_another_model_or_other_rows_are_not_resumed(build, make_vit, make_pixels, tmp_path):
    build(CHECKPOINTS).train()
    at = str(tmp_path / "run" / "checkpoint-2")
    other = make_vit()
    with torch.no_grad():
        other.vit.layers[0].mlp.fc1.weight[0, 0] += 1e-6
    for words, told in ({"model": other}, "model"), ({"harmful_dataset": make_pixels(30, seed=9)}, "harmful_dataset"):
        with pytest.raises(RecordError, match=f"expected the {told} that"):
            build(CHECKPOINTS, **words).train(resume_from_checkpoint=at)


class Rows(torch.utils.data.Dataset):
    """Rows without columns; each reading is noted, and pixels may be mirrored at random."""

    def __init__(self, pixels, random=False):
        self.held, self.random, self.read = pixels, random, []

    def __len__(self):
        return len(self.held)

    def __getitem__(self, row):
        self.read.append(row)
        pixels = self.held.pixel_values[row]
        flipped = self.random and torch.rand(()) < 0.5
        return {"pixel_values": pixels.flip(-1) if flipped else pixels, "labels": int(self.held.labels[row])}


@pytest.mark.parametrize("part", ["pixel_values", "labels"])
@pytest.mark.parametrize("kind", [lambda pixels: pixels, Rows], ids=["pixels", "dataset"])
@pytest.mark.parametrize("side", ["train_dataset", "harmful_dataset"])
def test_one_changed_row_of_all_is_another_dataset(build, make_pixels, tmp_path, side, kind, part):
    """Row 13 of 24 is none of the eight at equal distances."""
    build(CHECKPOINTS, **{side: kind(make_pixels(24))}).train()
    at, other = str(tmp_path / "run" / "checkpoint-2"), make_pixels(24)
    if part == "labels":
        other.labels[13] = (other.labels[13] + 1) % 3
    else:
        other.pixel_values[13, 0, 0, 0] += 1e-6
    with pytest.raises(RecordError, match=f"expected the {side} that"):
        build(CHECKPOINTS, **{side: kind(other)}).train(resume_from_checkpoint=at)
    build(CHECKPOINTS, **{side: kind(make_pixels(24))}).train(resume_from_checkpoint=at)


@pytest.mark.parametrize(
    "other", [{"caption": "b"}, {"image": Image.new("RGB", (2, 2), "red")}, {"pixel_values": [1.0, 2.5]}]
)
def test_words_images_and_lists_in_a_row_count(other):
    row = {"caption": "a", "image": Image.new("RGB", (2, 2), "blue"), "pixel_values": [1.0, 2.0]}
    rows = [dict(row) for _ in range(12)]
    digest = digest_data(rows, "rows")
    assert digest_data([dict(one) for one in rows], "rows") == digest != digest_data(rows[:11], "rows")
    assert digest_data([*rows[:10], row | other, rows[11]], "rows") != digest


@pytest.mark.parametrize("side,kind,metric", [
    ("eval_dataset", lambda rows: rows, "accuracy"), ("eval_dataset", lambda rows: {"near": rows}, "near_accuracy"),
    ("harmful_eval_dataset", Rows, "accuracy"),
], ids=["one", "several", "harmful"])  # fmt: skip
def test_rows_that_are_measured_and_not_trained_on_are_the_runs_own_as_well(
    build, make_pixels, tmp_path, side, kind, metric
):
    """The guard's base is of the old rows, and what it compares with it would be of the new ones."""
    options = {**CHECKPOINTS, "max_primary_drop": 100.0, "guard_metric": metric}
    build(options, **{side: kind(make_pixels(18, seed=5))}).train()
    at = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(RecordError, match=f"expected the {side} that"):
        build(options, **{side: kind(make_pixels(18, seed=6))}).train(resume_from_checkpoint=at)
    build(options, **{side: kind(make_pixels(18, seed=5))}).train(resume_from_checkpoint=at)


def test_options_that_decide_what_the_guard_compares_are_those_of_the_checkpoint(build, tmp_path):
    build({**CHECKPOINTS, "objective": "condition_number"}).train()
    at = str(tmp_path / "run" / "checkpoint-2")
    for options, told in (({"objective": "ill_only"}, r"objective='ill_only' \(there 'condition_number'\)"),
                          ({"sites": "lora"}, r"sites='lora' \(there 'head'\)"),
                          ({"guard_metric": "f1"}, r"guard_metric='f1' \(there 'accuracy'\)")):
        with pytest.raises(RecordError, match=f"expected the options that .* got {told}: what the guard compares"):
            build({**CHECKPOINTS, "objective": "condition_number", **options}).train(resume_from_checkpoint=at)
    free = {"max_steps": 6, "learning_rate": 1e-4, "strength": 0.3, "logging_steps": 1, "save_steps": 5}
    longer = build({**CHECKPOINTS, "objective": "condition_number", **free})
    longer.train(resume_from_checkpoint=at)
    assert longer.state.global_step == 6


def test_a_checkpoint_that_is_not_there_is_not_looked_for_on_the_hub(build, tmp_path):
    with pytest.raises(RecordError, match="expected the folder of a checkpoint, got .*checkpoint-99, which is not th"):
        build(CHECKPOINTS).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-99"))


def test_evaluation_rows_may_be_added_where_nothing_is_guarded(build, make_pixels, tmp_path):
    build(CHECKPOINTS, eval_dataset=None).train()
    at = str(tmp_path / "run" / "checkpoint-2")
    build(CHECKPOINTS, harmful_eval_dataset=make_pixels(18, seed=5)).train(resume_from_checkpoint=at)
    with pytest.raises(RecordError, match="expected the eval_dataset that"):
        build({**CHECKPOINTS, "max_primary_drop": 1.0}).train(resume_from_checkpoint=at)


def test_rows_are_digested_when_training_starts_and_only_where_checkpoints_are_written(build, make_pixels):
    rows = Rows(make_pixels(240))
    trainer = build(CHECKPOINTS, train_dataset=rows)
    assert len(rows.read) <= 8  # none but the constructor's few
    trainer.train()
    assert set(rows.read) == set(range(240))
    others = Rows(make_pixels(240))
    build(train_dataset=others).train()
    assert len(set(others.read)) < 120


@pytest.mark.slow
def test_under_a_random_transform_labels_tell_rows_apart_and_workers_read_them(build, make_pixels, tmp_path):
    options = {**CHECKPOINTS, "dataloader_num_workers": 1}
    build(options, train_dataset=Rows(make_pixels(40), random=True)).train()
    at = str(tmp_path / "run" / "checkpoint-2")
    build(options, train_dataset=Rows(make_pixels(40), random=True)).train(resume_from_checkpoint=at)
    other = make_pixels(40)
    other.labels[13] = (other.labels[13] + 1) % 3
    with pytest.raises(RecordError, match="expected the train_dataset that"):
        build(options, train_dataset=Rows(other, random=True)).train(resume_from_checkpoint=at)


def test_a_checkpoint_holds_only_what_changed_and_resumes_bit_for_bit(build, tmp_path):
    options = {**CHECKPOINTS, "trainable_modules": "last:1"}
    whole = build(options)
    whole.train()
    folder = tmp_path / "run" / "checkpoint-2"
    assert (folder / "changed.safetensors").is_file() and not (folder / "model.safetensors").exists()
    parts = sum(p.numel() for p in whole.model.parameters() if p.requires_grad)
    assert (folder / "changed.safetensors").stat().st_size < 4 * parts + 20_000
    assert json.loads((folder / "immunization_state.json").read_text())["identity"].keys() >= {"model"}
    again = build(options)
    again.train(resume_from_checkpoint=str(folder))
    assert same(weights(whole.model), weights(again.model))
    with pytest.raises(RecordError, match="trainable_modules"):
        build({**options, "trainable_modules": "classifier"}).train(resume_from_checkpoint=str(folder))


def test_each_row_of_the_table_names_tests_that_are_here():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| option \| here \| tests.*?\n\|---.*?\n(.*?)\n\n", page, flags=re.S)
    rows = table.splitlines()
    assert len(rows) >= 11
    for row in rows:
        named = re.findall(r"`(\w+)`", row.rstrip(" |").rpartition(" | ")[2])
        assert named, row
        assert not [name for name in named if f"test_{name}" not in globals()], row


def test_classes_may_be_made_of_logits_before_metrics():
    from transformers import EvalPrediction

    from hf_immunize.training.vision.metrics import BaseLabels, accuracy, metrics_of

    logits, labels = np.eye(3)[[0, 1, 2, 2]], np.asarray([0, 1, 2, 0])
    told = metrics_of("single")
    for predictions in (logits, logits.argmax(-1)):
        found = BaseLabels(accuracy)
        found.open = True
        assert found(EvalPrediction(predictions, labels)) == {"accuracy": 0.75}
        assert told is None or told(EvalPrediction(predictions, labels))["accuracy"] == 0.75
        found.refuse_other_order(["a", "b", "c"], "here")
