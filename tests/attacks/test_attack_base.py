"""Attackers who hold more than the model and harmful data: the base, benign images, a fresh copy, augmentation."""

import dataclasses
import math

import pytest
import torch
from test_attack_finetune import only
from torch import nn

from hf_immunize.attacks import ATTACKS, AttackContext, Run, load_classifier, run_suite
from hf_immunize.attacks import _finetune as engine
from hf_immunize.attacks.vision._preparations import mixed_head as prepare_mixed
from hf_immunize.attacks.vision._rows import augment, collator, training_rows
from hf_immunize.attacks.vision.distil_fresh import DistilFresh, distil
from hf_immunize.attacks.vision.distil_fresh import _prepare as prepare_student
from hf_immunize.attacks.vision.fold_linear_map import FoldLinearMap, fold
from hf_immunize.attacks.vision.subtract_difference import SubtractDifference
from hf_immunize.attacks.vision.subtract_difference import _prepare as prepare_difference
from hf_immunize.errors import RunMismatchError
from hf_immunize.records import AttackTrace

AugmentedFinetune, FullFinetune, MixedFinetune = (
    ATTACKS[name].config for name in ("augmented_finetune", "full_finetune", "mixed_finetune")
)

@pytest.fixture
def pair(make_context):
    """A control that holds itself as base, and a subject of other weights that holds the control."""
    control = make_context("control", seed=0)
    subject = make_context("subject", seed=1)
    return [dataclasses.replace(context, base=control.folder) for context in (control, subject)]


def test_the_whole_difference_leaves_the_base_and_a_part_lies_between(pair):
    control, subject = pair
    base, mine = (load_classifier(context.folder).state_dict() for context in (control, subject))
    whole = prepare_difference(subject, Run(SubtractDifference(), "x", 3)).state_dict()
    half = prepare_difference(subject, Run(SubtractDifference(share=0.5), "x", 3)).state_dict()
    for name in base:
        if not name.startswith("classifier."):
            assert torch.allclose(whole[name], base[name], atol=1e-6), name
            assert torch.allclose(half[name], (base[name] + mine[name]) / 2, atol=1e-6), name
    fresh = subject.model_with_new_head(3).state_dict()
    assert torch.equal(whole["classifier.weight"], fresh["classifier.weight"])


def test_a_low_rank_difference_is_found_whole(pair, make_vit):
    control, _ = pair
    model = load_classifier(control.folder)
    layer = "vit.layers.0.mlp.fc1.weight"
    with torch.no_grad():
        weight = model.state_dict()[layer]
        weight += 5 * torch.outer(torch.randn(len(weight)), torch.randn(weight.shape[1]))
    folder = control.folder.with_name("low_rank")
    model.save_pretrained(folder)
    context = dataclasses.replace(control, folder=folder, role="subject", _features={})
    restored = prepare_difference(context, Run(SubtractDifference(rank=1), "x", 0)).state_dict()[layer]
    assert torch.allclose(restored, load_classifier(control.folder).state_dict()[layer], atol=1e-4)


def test_fine_tuning_after_the_whole_difference_is_fine_tuning_of_the_base(pair):
    control, subject = pair
    found = only(subject, "subtract_difference", SubtractDifference(1e-2, 10))
    wanted = only(control, "full_finetune", FullFinetune(1e-2, 10))
    assert [point.test for point in found.curve] == pytest.approx([point.test for point in wanted.curve], abs=0.05)


def test_folding_undoes_an_ill_conditioned_layer_before_the_head(pair, monkeypatch):
    """Features times an invertible matrix of condition 1e3 probe exactly as the base's do."""
    control, subject = pair
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(16, 16, generator=generator).double())[0] for _ in range(2))
    layer = left * torch.logspace(0, -3, 16).double() @ right
    planted = {name: value.double() @ layer for name, value in control.features(0).items()}
    monkeypatch.setitem(subject._features, (None, "classifier"), planted)
    config = FoldLinearMap(learning_rate=64.0, steps=300)
    folded, honest = (only(context, "fold_linear_map", config) for context in (subject, control))
    naive = only(subject, "linear_probe_gd", ATTACKS["linear_probe_gd"].config(64.0, 300))
    plain = only(control, "linear_probe_gd", ATTACKS["linear_probe_gd"].config(64.0, 300))
    assert [point.test for point in folded.curve] == pytest.approx([point.test for point in plain.curve], abs=0.03)
    assert [point.test for point in honest.curve] == pytest.approx([point.test for point in plain.curve], abs=0.03)
    assert [point.test for point in naive.curve] != pytest.approx([point.test for point in plain.curve], abs=0.03)
    assert folded.outcome == "completed" and "explains 1.0000 of the base's feature variance" in folded.note


def test_what_no_linear_map_explains_is_said_to_be_so(pair):
    control, subject = pair
    _, explained = fold(subject, control.features(0), 0)
    assert explained < 0.999


@pytest.mark.parametrize("name", ["fold_linear_map", "subtract_difference", "mixed_finetune"])
def test_without_base_or_benign_data_these_do_not_apply(make_context, name):
    result = only(make_context(), name, ATTACKS[name].config())
    assert result.outcome == "not_applicable" and "the attacker of this exam" in result.note


@pytest.mark.parametrize("name", ["fold_linear_map", "subtract_difference"])
def test_random_weights_have_no_base(make_context, pair, name):
    context = dataclasses.replace(make_context("scratch"), base=pair[0].folder)
    assert only(context, name, ATTACKS[name].config()).outcome == "not_applicable"


def test_which_base_was_held_is_written_and_another_is_another_run(pair, tmp_path):
    control, subject = pair

    def sit(context):
        return run_suite(context, ATTACKS, ["fold_linear_map"], [0], tmp_path, {"fold_linear_map": {"steps": (3,)}})

    sit(subject), sit(control)
    traces = [AttackTrace.read(path) for path in tmp_path.glob("traces/*/*seed0.json")]
    assert len(traces) == 14 and len({trace.config["base"] for trace in traces}) == 1
    with pytest.raises(RunMismatchError, match="another config"):
        sit(dataclasses.replace(subject, base=subject.folder, _features={}))


def test_a_student_is_fresh_and_learns_the_teachers_outputs(make_context):
    context = make_context(rows=120)
    pixels = context.attack.pixel_values
    with torch.no_grad():
        wanted = context.model(0).eval()(pixel_values=pixels).logits.softmax(-1)

    def distance(config):
        model = distil(context, config, 5)
        with torch.no_grad():
            guess = model.eval()(pixel_values=pixels).logits.log_softmax(-1)
        return nn.functional.kl_div(guess, wanted, reduction="batchmean").item(), model.state_dict()

    (few, fresh), (many, _) = (distance(DistilFresh(3e-3, steps, share=0.5)) for steps in (2, 160))
    assert many < 0.3 * few
    name = "vit.layers.0.mlp.fc1.weight"
    assert (fresh[name] - context.model(0).state_dict()[name]).abs().mean() > 1e-2
    model = prepare_student(context, Run(DistilFresh(3e-3, 2), "x", 0))
    assert model.classifier.out_features == 3 and all(parameter.requires_grad for parameter in model.parameters())


def test_steps_of_distillation_are_paid_for(make_context):
    result = only(make_context(), "distil_fresh", DistilFresh(1e-2, 12, share=0.5))
    assert result.outcome == "completed" and result.budget == 12
    assert result.curve[0].step == 7 and result.curve[-1].step == 12
    assert result.samples == engine.trained_samples(48, 32, 12)


def test_benign_rows_are_mixed_in_as_classes_of_their_own(make_context, make_pixels):
    benign = make_pixels(rows=40, classes=2, seed=9)
    benign.pixel_values = -2 - benign.pixel_values  # or they look like harmful rows with other labels
    context = dataclasses.replace(make_context(), benign=benign)
    data = training_rows(context, MixedFinetune(benign_share=0.4), 1)
    counts = torch.bincount(data.labels, minlength=5).tolist()
    assert counts[:3] == [16, 16, 16] and sum(counts[3:]) == 32  # 32 of 80 rows
    added = {tuple(row.flatten().tolist()) for row in data.pixel_values[data.labels >= 3]}
    assert added <= {tuple(row.flatten().tolist()) for row in benign.pixel_values}
    assert prepare_mixed(context, Run(MixedFinetune(), "x", 0)).classifier.out_features == 5
    result = only(context, "mixed_finetune", MixedFinetune(1e-2, 30))
    assert result.outcome == "completed" and max(point.test for point in result.curve) > 0.6


def options(**changes):
    return {"flip": False, "crop": 0.0, "jitter": 0.0, "erase": 0.0} | changes


def images():
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def generator():
    return torch.Generator().manual_seed(1)


def test_augmentation_that_is_switched_off_changes_nothing():
    assert torch.allclose(augment(images(), generator(), **options()), images(), atol=1e-6)


def test_every_augmentation_does_what_it_says():
    plain = images()
    mirrored = augment(plain, generator(), **options(flip=True))
    flipped = torch.tensor([not torch.allclose(a, b, atol=1e-6) for a, b in zip(mirrored, plain, strict=True)])
    assert 16 < int(flipped.sum()) < 48 and torch.allclose(mirrored[flipped], plain[flipped].flip(3), atol=1e-6)
    shifted = augment(plain, generator(), **options(crop=0.25))
    padded = nn.functional.pad(plain, (2,) * 4, mode="replicate")
    for one, frame in zip(shifted[:8], padded[:8], strict=True):
        windows = [frame[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
        assert any(torch.allclose(one, window, atol=1e-6) for window in windows)
    erased = augment(plain, generator(), **options(erase=0.5))
    changed = (erased - plain).abs().amax(dim=1) > 1e-6
    assert set(changed.sum(dim=(1, 2)).tolist()) == {16}
    brighter = augment(plain, generator(), **options(jitter=0.5))
    ratio = brighter.std(dim=(1, 2, 3)) / plain.std(dim=(1, 2, 3))
    assert 0.5 <= float(ratio.min()) < 0.8 and 1.2 < float(ratio.max()) <= 1.5


def test_augmented_batches_are_the_seeds_and_new_every_time(make_context):
    context = make_context()
    rows = [context.attack[index] for index in range(8)]
    config = AugmentedFinetune()
    first, again, other = collator(config, 0), collator(config, 0), collator(config, 1)
    batch = first(rows)
    assert torch.equal(batch["pixel_values"], again(rows)["pixel_values"])
    assert not torch.equal(batch["pixel_values"], other(rows)["pixel_values"])
    assert not torch.equal(batch["pixel_values"], first(rows)["pixel_values"])
    assert collator(FullFinetune(), 0)(rows)["pixel_values"].equal(context.attack.pixel_values[:8])


def test_costs_are_counted(make_context):
    from hf_immunize.attacks.vision._cost import forward_flops, probe_flops, ridge_flops, trained_samples

    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(12, 5), nn.Linear(5, 2)

        def forward(self, pixel_values):
            return self.second(self.first(pixel_values.flatten(1)))

    assert forward_flops(Toy(), torch.Size([3, 2, 2])) == 2 * (12 * 5 + 5 * 2)
    assert trained_samples(10, 32, 7) == 70 and trained_samples(48, 32, 2) == 48
    assert probe_flops(10, 3, 2, 5) == 4 * 10 * 3 * 2 * 5 and ridge_flops(10, 3, 2) == ridge_flops(3, 10, 2)
    result = only(make_context(), "full_finetune", FullFinetune(1e-3, 3))
    assert result.samples == 72 and math.isfinite(result.flops) and result.flops > 72 * 3 * 16 * 16
    probe = only(make_context(), "linear_probe_gd", ATTACKS["linear_probe_gd"].config(4.0, 10))
    assert (probe.samples, probe.flops) == (480, 4 * 48 * 17 * 3 * 10)


def test_contexts_hash_their_holdings(pair, make_pixels):
    control, subject = pair
    assert control.base_digest == subject.base_digest
    benign = [dataclasses.replace(control, benign=make_pixels(seed=seed)) for seed in (1, 1, 2)]
    assert benign[0].benign_digest == benign[1].benign_digest != benign[2].benign_digest
    assert isinstance(control, AttackContext)
