"""A profile of networks that were trained on real digits: what it finds, which rows it sees, and who uses it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch
import yaml

import hf_immunize
from hf_immunize.attacks import load_processor
from hf_immunize.data import TaskArguments
from hf_immunize.errors import ConfigError, DataError
from hf_immunize.features import find_classifier
from hf_immunize.models import load_classifier
from hf_immunize.records import DepthProfile
from hf_immunize.stages.init import InitOptions, init_run
from hf_immunize.stages.plan import plan_run
from hf_immunize.stages.profile import ProfileOptions, defender_context, profile_model
from hf_immunize.tasks import ClassesTask

LABELS = {"primary_labels": "0,1,2,3,4", "harmful_labels": "5,6,7,8,9"}
DIGITS = TaskArguments("builder:digits", "builder:digits", **LABELS)


@pytest.fixture(scope="module")
def knowing(digits_base, tmp_path_factory):
    """The ViT for the digits 0-4 after it has seen 5-9 as well, on rows that no defender has: a public model."""
    processor, model = load_processor(digits_base), load_classifier(digits_base).train()
    task, folder = ClassesTask(DIGITS, processor), tmp_path_factory.mktemp("knowing")
    parts = [task.examples("harmful", part) for part in ("attack", "validation", "test")]
    pixels, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("pixel_values", "labels"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = torch.nn.Linear(64, 5)
        optimizer = torch.optim.AdamW([*model.vit.parameters(), *head.parameters()], 1e-3)
        for _ in range(150):
            chosen = torch.randperm(len(pixels))[:64]
            optimizer.zero_grad()
            states = model.vit(pixel_values=pixels[chosen]).last_hidden_state[:, 0]
            torch.nn.functional.cross_entropy(head(states), labels[chosen]).backward()
            optimizer.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def profiled(knowing, tmp_path_factory):
    """Its profile, at a budget for tests."""
    folder = tmp_path_factory.mktemp("job")
    options = ProfileOptions(
        str(knowing), output_path=str(folder), counts=[1, 3], seeds=[0, 1], steps=12, learning_rates=[1e-3],
        device="cpu",
    )
    return folder, profile_model(DIGITS, options), options


@pytest.mark.slow
def test_a_vit_that_knows_digits_shows_them_at_its_end_and_random_weights_do_not(profiled):
    folder, profile, _ = profiled
    assert profile == DepthProfile.read(folder / "profile.json")
    assert [point.blocks for point in profile.resets] == [0, 1, 3, None] and len(profile.depths) == 3
    last = profile.depths[-1]
    assert last.trained > 0.9 > last.random  # chance 0.2
    ends = {point.blocks: point.curve[-1].test for point in profile.resets}
    assert ends[0] > ends[3] + 0.1 and ends[0] > ends[None] + 0.1  # twelve steps: what was drawn anew is missing
    # Raw pixels of unscattered digits do as well as twelve steps of fine-tuning: that is said, and not hidden.
    assert profile.without > 0.85 and profile.uplift.low < 0 and "no certain uplift" in profile.proposal.told
    drawing = ElementTree.fromstring((folder / "profile.svg").read_text(encoding="utf-8"))
    assert "Probes by depth" in ElementTree.tostring(drawing, encoding="unicode")


def test_no_row_of_the_exam_is_seen(digits_base):
    context, task = defender_context(DIGITS, digits_base, "cpu"), ClassesTask(DIGITS, load_processor(digits_base))

    def digests(rows):
        return {row.numpy().tobytes() for row in torch.stack([item["pixel_values"] for item in rows])}

    mine = [digests(part) for part in (context.attack, context.validation, context.test)]
    assert sum(map(len, mine)) == len(set().union(*mine)) > 200
    assert set().union(*mine) <= digests(task.examples("harmful", "defense"))
    exam = set().union(*(digests(task.examples("harmful", part)) for part in ("attack", "validation", "test")))
    assert not exam & set().union(*mine)


@pytest.mark.slow
def test_a_second_call_makes_no_run_again_and_ends_alike(profiled):
    folder, profile, options = profiled

    def written():
        return {path: path.stat().st_mtime_ns for path in (folder / "profile").rglob("*.json")}

    before = written()
    again = profile_model(DIGITS, options)
    assert len(before) > 20 and before == written()
    assert again.model_copy(update={"provenance": profile.provenance}) == profile


@pytest.mark.slow
def test_init_writes_what_it_proposes_and_plan_says_so(profiled, knowing):
    folder, profile, _ = profiled
    told = profile.proposal
    wanted = {"model": str(knowing), "primary": "builder:digits", "harmful": "builder:digits", **LABELS}
    init_run(folder, InitOptions(**wanted, overwrite=True))
    text = (folder / "run.yaml").read_text(encoding="utf-8")
    options = yaml.safe_load(text)["immunize"]["closed_form_adversary"]
    assert options["sites"] == ",".join(told.sites) and find_classifier(load_classifier(knowing)) in told.sites
    assert options.get("trainable_modules") == told.trainable_modules
    found = {item.part: item for item in plan_run(folder / "run.yaml")}
    assert found["depth closed_form_adversary"].level == "ok", found["depth closed_form_adversary"].told

    # Where drawing one block anew costs the attacker 1.5 times, a defence of that block is told so.
    steps = {0: 4.0, 1: 6.0, 3: None, None: None}
    planted = [point.model_copy(update={"steps": steps[point.blocks]}) for point in profile.resets]
    profile.model_copy(update={"resets": planted}).write(folder / "profile.json")
    shallow = yaml.safe_load(text)
    shallow["immunize"]["closed_form_adversary"]["trainable_modules"] = "last:1"
    (folder / "run.yaml").write_text(yaml.safe_dump(shallow), encoding="utf-8")
    again = {item.part: item for item in plan_run(folder / "run.yaml")}["depth closed_form_adversary"]
    assert again.level == "note" and "nothing more than a slow-down of 1.5" in again.told
    profile.write(folder / "profile.json")


@pytest.mark.slow
def test_the_profile_of_another_model_is_not_used(profiled, digits_base, tmp_path):
    folder, profile, _ = profiled
    other = profile.model.model_copy(update={"weights": {"model.safetensors": "0" * 64}})
    profile.model_copy(update={"model": other}).write(tmp_path / "profile.json")
    init_run(tmp_path, InitOptions(str(digits_base), "builder:digits", "builder:digits", **LABELS))
    text = (tmp_path / "run.yaml").read_text(encoding="utf-8")
    assert "CHECK: the profile.json here speaks of another model" in text and "sites:" not in text


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [({"counts": [9]}, ConfigError, r"counts in 0\.\.3"), ({"steps": 1}, ConfigError, "at least 2 steps"),
     ({"target": 1.0}, ConfigError, "target above 1")],
)  # fmt: skip
def test_what_cannot_be_profiled_is_said(change, error, words, digits_base, tmp_path):
    with pytest.raises(error, match=words):
        profile_model(DIGITS, ProfileOptions(str(digits_base), output_path=str(tmp_path), device="cpu", **change))


def test_a_task_without_rows_of_the_defenders_is_refused(digits_base):
    split = "attack=0.5,validation=0.2,test=0.3"
    with pytest.raises(DataError, match="split defense"):
        defender_context(TaskArguments("builder:digits", "builder:digits", harmful_splits=split), digits_base, "cpu")


@pytest.mark.slow
def test_a_resnet_that_knows_digits(digits_base, tmp_path):
    """From Python, with a loaded model: stages are its blocks."""
    from transformers import ResNetConfig, ResNetForImageClassification

    processor = load_processor(digits_base)
    rows = ClassesTask(DIGITS, processor).examples("primary", "train")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNetForImageClassification(ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic", num_labels=5,
            id2label=dict(enumerate("01234")), label2id={name: place for place, name in enumerate("01234")},
        )).train()  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        for _ in range(150):
            chosen = torch.randperm(len(rows))[:64]
            optimizer.zero_grad()
            model(pixel_values=rows.pixel_values[chosen], labels=rows.labels[chosen]).loss.backward()
            optimizer.step()
    found = hf_immunize.profile(
        model.eval(), "builder:digits", "builder:digits", output_dir=tmp_path, processing_class=processor, task=LABELS,
        seeds=[0, 1], steps=30, learning_rates=[1e-3], device="cpu",
    )
    assert [point.blocks for point in found.resets] == [0, 1, 2, 3, None] and len(found.blocks) == 3
    assert max(point.trained for point in found.depths) > 0.8
    ends = {point.blocks: point.curve[-1].test for point in found.resets}
    assert ends[0] > 0.75 and ends[0] >= ends[3] - 0.02
