"""Harmful rows without classes: one class, several labels, numbers, nothing; and terms that cannot do without."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import Dataset

from hf_immunize.data import RowBatchSampler, targets_of
from hf_immunize.errors import ConfigError, DataError, SpectrumError
from hf_immunize.linalg import ridge_r_squared
from hf_immunize.training.core.registry import OBJECTIVES, terms_of
from hf_immunize.training.vision.harmful_task import HarmfulTask
from hf_immunize.training.vision.judging import Measured, judge

TELLING = sorted(name for name in OBJECTIVES if any(term.tells_classes_apart for term in terms_of(name)))
FREE = sorted(set(OBJECTIVES) - set(TELLING))


class Images(Dataset):
    """Images with any labels, or none; nothing beside the rows says what these are."""

    def __init__(self, pixels: torch.Tensor, labels=None, key: str = "labels"):
        self.pixels, self.held, self.key, self.read = pixels, labels, key, 0

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> dict:
        self.read += 1
        found = {"pixel_values": self.pixels[row]}
        return found if self.held is None else found | {self.key: self.held[row]}


def numbers(rows: int, width: int | None = None) -> torch.Tensor:
    shape = (rows,) if width is None else (rows, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


KINDS = {
    "one class": (lambda rows: torch.zeros(rows, dtype=torch.long), "1 class", None),
    "another class": (lambda rows: torch.full((rows,), 4), "1 class", None),
    "bits": (lambda rows: (numbers(rows, 5) > 0).long(), "several labels in a row", "r2"),
    "numbers": (lambda rows: numbers(rows), "numbers as labels", "r2"),
    "vectors": (lambda rows: numbers(rows, 3), "numbers as labels", "r2"),
    "nothing": (lambda rows: None, "no labels", None),
}


def harmful_of(make_pixels, kind: str, rows: int = 30) -> Images:
    pixels = make_pixels(rows, seed=1).pixel_values
    labels = KINDS[kind][0](rows)
    if kind == "numbers":
        labels = labels + pixels.mean(dim=(1, 2, 3))  # something that can be learned
    return Images(pixels, labels, "label" if kind == "bits" else "labels")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", FREE)
def test_terms_that_need_no_classes_train_and_are_measured(make_trainer, make_pixels, kind, objective):
    trainer = make_trainer(harmful=harmful_of(make_pixels, kind), objective=objective, max_steps=3)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert all(math.isfinite(entry[term.name]) for term in terms_of(objective))
    found, metric = trainer.outcome, KINDS[kind][2]
    assert trainer.harmful_task.targets.told == KINDS[kind][1] and found.rows == 30
    assert found.probe_metric == metric
    if metric is None:
        assert found.probe_before is None and found.probe_after is None and found.chance is None
        assert "no probe on 30 harmful rows" in found.told
        assert not any("harmful_probe" in entry for entry in trainer.state.log_history)
    else:
        assert found.chance == 0 and found.probe_before <= 1 and "R2" in found.told
    assert {term.name for term in terms_of(objective) if term.side == "harmful"} <= set(found.terms_before)


def test_a_simulated_attacker_of_numbers_ends_at_a_higher_error(make_trainer, make_pixels, make_vit):
    trainer = make_trainer(model=make_vit(), harmful=harmful_of(make_pixels, "numbers"), objective="simulated_attack",
                           max_steps=30, per_device_harmful_batch_size=30, attacker_learning_rate=1e-2, horizon="100")
    trainer.train()
    term = "harmful_simulated_attack"
    assert trainer.outcome.terms_before[term] > 0.05  # the attacker learned something
    assert trainer.outcome.terms_after[term] < 0.7 * trainer.outcome.terms_before[term]


def test_images_without_labels_cannot_be_answered_from_a_cache(make_trainer, make_pixels, tmp_path):
    options = {"objective": "simulated_attack", "attacker_rank": 2, "trainable_modules": "last:1", "max_steps": 2,
               "cache_frozen_features": True, "feature_cache_dir": str(tmp_path)}
    for kind in ("nothing", "one class"):  # what works without labels is tried on digits, in test_outcome.py
        with pytest.raises(ConfigError, match="cache_frozen_features off for simulated_attack with harmful_dataset"):
            make_trainer(harmful=harmful_of(make_pixels, kind), **options).train()
    trainer = make_trainer(harmful=harmful_of(make_pixels, "numbers"), **options)
    trainer.train()
    assert trainer.outcome.terms_before["harmful_simulated_attack"] >= 0


def test_labels_that_no_term_looks_at_change_nothing_that_is_trained(make_trainer, make_pixels, make_vit):
    weights = []
    for kind in ("one class", "numbers", "bits", "nothing"):
        model = make_vit()
        make_trainer(model=model, harmful=harmful_of(make_pixels, kind), max_steps=2).train()
        weights.append(model.state_dict())
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", TELLING)
def test_terms_that_tell_classes_apart_are_refused_by_name(make_trainer, make_pixels, kind, objective):
    (term,) = terms_of(objective)
    wanted = {"nothing": "expected a 'labels' column in harmful_dataset", "one class": "at least two classes",
              "another class": "at least two classes"}.get(kind, "expected one class for each row of harmful_dataset")
    with pytest.raises(DataError, match=rf"{wanted}.*{term.name}.*choose an objective that"):
        trainer = make_trainer(harmful=harmful_of(make_pixels, kind), objective=objective)
        trainer.train()  # labels of all rows are counted by now


def test_other_kinds_of_primary_heads_take_rows_without_labels(make_trainer, make_pixels):
    from transformers import ViTConfig, ViTForImageClassification

    for kind, outputs, labels in (("regression", 1, numbers(24)),
                                  ("multi_label_classification", 3, (numbers(24, 3) > 0).float())):
        config = ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=32, num_labels=outputs, problem_type=kind)
        primary = Images(make_pixels(24).pixel_values, labels)
        for harmful in ("nothing", "bits", "numbers"):
            trainer = make_trainer(model=ViTForImageClassification(config), primary=primary, max_steps=2,
                                   harmful=harmful_of(make_pixels, harmful))
            trainer.train()
            assert trainer.state.global_step == 2


def test_cached_features_of_rows_without_labels(make_trainer, make_pixels, tmp_path):
    trainer = make_trainer(harmful=harmful_of(make_pixels, "numbers"), trainable_modules="last:1", max_steps=2,
                           cache_frozen_features=True, feature_cache_dir=str(tmp_path / "cache"))
    trainer.train()
    assert trainer.outcome.probe_metric == "r2"


def test_rows_that_cannot_be_used_are_refused(make_trainer, make_pixels):
    with pytest.raises(DataError, match="a 'labels' column in harmful_dataset, or at least two rows, got 1 rows"):
        make_trainer(harmful=Images(make_pixels(1).pixel_values))
    with pytest.raises(ConfigError, match="no harmful_classes_per_batch for harmful_dataset, whose rows have no class"):
        make_trainer(harmful=Images(make_pixels(30).pixel_values), harmful_classes_per_batch=2)
    with pytest.raises(DataError, match="a global harmful batch of at least two rows, got 1"):
        make_trainer(harmful=Images(make_pixels(30).pixel_values), per_device_harmful_batch_size=1)
    with pytest.raises(DataError, match="finite labels in harmful_dataset, got nan in row 1"):
        make_trainer(harmful=[{"pixel_values": torch.zeros(3, 8, 8), "labels": value} for value in (0.5, math.nan)])
    uneven = [{"pixel_values": torch.zeros(3, 8, 8), "labels": value} for value in ([1, 2], [3])]
    with pytest.raises(DataError, match="label vectors of one length in harmful_dataset, got shapes .* 0 and 1"):
        make_trainer(harmful=uneven)


@pytest.mark.parametrize("values,kind", [
    ([0, 1, 2], "classes"), ([1.0, 2.0], "classes"), (torch.tensor([3, 3]), "classes"), ([True, False], "classes"),
    ([0.5, 1.0], "regression"), (torch.tensor([0.25, 1.0]), "regression"), ([[1, 0], [0, 1]], "multi-label"),
    (torch.tensor([[1.0, 0.0]]), "multi-label"), ([[1, 2]], "regression"), ([torch.tensor(0.5)], "regression"),
], ids=str)  # fmt: skip
def test_labels_say_what_they_are(values, kind):
    assert targets_of(values, "x").kind == kind


def test_a_held_out_dataset_of_another_kind_is_measured_by_its_own_labels(make_pixels):
    task = HarmfulTask(Images(make_pixels(4).pixel_values, numbers(4)), "harmful_eval_dataset")
    assert task.kind == "regression" and task.targets is None and task.classes is None
    task.count()
    assert torch.equal(task.targets.values, numbers(4)) and task.labels.tolist() == [0] * 4


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_out_the_batches_of_rows_without_classes(world):
    whole = RowBatchSampler(20, 12, seed=3).global_batch(4).tolist()
    parts = [next(iter(RowBatchSampler(20, 12, seed=3, start=4, rank=rank, world_size=world))) for rank in range(world)]
    assert [whole[rank::world] for rank in range(world)] == parts and len(set(whole)) == 12
    small = RowBatchSampler(5, 12, seed=3).global_batch(0).tolist()
    assert set(small) == set(range(5)) and len(small) == 12
    assert RowBatchSampler(20, 12, seed=3).global_batch(5).tolist() != whole


@pytest.mark.parametrize("rows,width,columns", [(40, 8, 1), (12, 30, 3)])
@pytest.mark.parametrize("horizon", [1.0, 1e3, 1e6])
def test_the_ridge_r2_is_that_of_a_solved_system(rows, width, columns, horizon):
    generator = torch.Generator().manual_seed(rows)
    support, query = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    true = torch.randn(width, columns, generator=generator, dtype=torch.float64)
    targets, wanted = support @ true + 0.3, query @ true + 0.1 * torch.randn(rows, columns, generator=generator)
    phi, mean = support - support.mean(0), targets.mean(0)
    penalty = torch.linalg.matrix_norm(phi, 2) ** 2 / horizon
    weights = torch.linalg.solve(phi.T @ phi + penalty * torch.eye(width).double(), phi.T @ (targets - mean))
    residual = wanted - (query - support.mean(0)) @ weights - mean
    truth = 1 - residual.square().sum() / (wanted - mean).square().sum()
    given = (targets[:, 0], wanted[:, 0]) if columns == 1 else (targets, wanted)
    (found,) = ridge_r_squared(support, given[0], query, given[1], [horizon])
    assert float(found) == pytest.approx(float(truth), rel=1e-8)
    with pytest.raises(SpectrumError, match="at least two values"):
        ridge_r_squared(support, torch.ones(rows), query, torch.ones(rows), [horizon])


def test_without_a_probe_the_terms_alone_decide():
    harmful = [term for term in terms_of("ill_only") if term.side == "harmful"]
    before, after = (Measured({"harmful_r_ill": value}, None) for value in (1.0, 0.1))
    immunized, told = judge(before, after, None, harmful, "held-out harmful rows")
    assert immunized and "no probe on held-out harmful rows" in told
    assert judge(after, before, None, harmful, "rows")[0] is False
