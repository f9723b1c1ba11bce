"""Three families behind one protocol: the same questions, and answers that agree with the data itself."""

from __future__ import annotations

import pytest
from transformers import ViTImageProcessorPil

from hf_immunize.attacks import AttackContext
from hf_immunize.data import Task, TaskArguments
from hf_immunize.diffusion.tasks import ConceptArguments, ConceptTask
from hf_immunize.errors import DataError
from hf_immunize.tasks import ATTACKER_SPLITS, ClassesTask, ExamTask, attacker_fingerprints, attacker_holds

PROCESSOR = ViTImageProcessorPil(size={"height": 8, "width": 8})


def classes(benign="builder:digits"):
    return ClassesTask(TaskArguments(
        "builder:digits", "builder:digits", primary_labels="0,1", harmful_labels="5,6", benign_dataset=benign,
        benign_labels="7,8",
    ), PROCESSOR)  # fmt: skip


def concepts():
    return ConceptTask(ConceptArguments("builder:digits", image_size=8))


@pytest.mark.parametrize(("make", "kept"), [(classes, "primary"), (concepts, "retain")])
def test_rows_and_fingerprints_by_side_and_split(make, kept):
    task = make()
    assert isinstance(task, ExamTask) and task.sides == (kept, "harmful", "benign")
    prints = [task.fingerprint(side, split) for side in task.sides for split in ("validation", "test")]
    assert len({found.sha256 for found in prints}) == 6 and prints[0].role == f"{kept} validation"
    assert [found.rows for found in prints[:2]] == [len(task.examples(kept, split)) for split in ("validation", "test")]
    held = attacker_holds(task, "harmful")
    assert set(ATTACKER_SPLITS) | {"data"} < set(held) and held["data"] == attacker_fingerprints(task, "harmful")
    assert task.fingerprint("harmful", "defense") not in held["data"]
    for side, split in (("harmful", "train"), ("other", "test")):
        with pytest.raises(DataError, match="expected a s"):
            task.examples(side, split)


def test_classes_are_the_tasks_of_the_data_room():
    task = classes()
    plain = Task(TaskArguments("builder:digits", "builder:digits", harmful_labels="5,6"), "harmful")
    rows = plain.pixels("attack", PROCESSOR)
    assert task.fingerprint("harmful", "attack") == plain.fingerprint(rows, "attack")
    assert task.label_names == ["0", "1"] and task.examples("harmful", "attack") is task.examples("harmful", "attack")
    known = task.attacker_knows("harmful")["benign"]
    assert known.label_names == ["7", "8"] and task.attacker_knows("benign") == {"benign": None}
    alone = classes(benign=None)
    assert alone.sides == ("primary", "harmful") and alone.attacker_knows("harmful") == {"benign": None}
    with pytest.raises(DataError, match="expected a benign task, got none: set benign_dataset"):
        alone.examples("benign", "test")


def test_what_an_attacker_holds_is_what_its_context_takes(tmp_path):
    context = AttackContext(folder=tmp_path, role="control", **attacker_holds(classes(), "harmful"))
    assert context.data[0].role == "harmful attack" and context.holding("benign") is not None


def test_described_gives_away_no_path(tmp_path):
    import numpy as np

    digits = tmp_path / "digits.npz"
    levels = np.random.default_rng(0).integers(0, 255, (60, 8, 8)).astype(np.uint8)
    np.savez(digits, images=levels, labels=np.arange(60) % 3)
    task = ConceptTask(ConceptArguments(
        str(digits), other_dataset=str(digits), retain_labels="0", harmful_labels="1", benign_labels="2", image_size=8
    ))  # fmt: skip
    told = task.described()
    assert (told["dataset"], told["other_dataset"], told["retain_labels"]) == ("digits.npz", "digits.npz", "0")
    assert classes().described()["benign_dataset"] == "builder:digits"


def test_some_sides_are_described_by_what_decides_their_rows_alone():
    whole, one = classes().described(), classes().described("primary")
    assert {name for name in whole if name not in one} == {
        name for name in whole if name.startswith(("harmful_", "benign_"))}
    assert all(one[name] == whole[name] for name in one) and "split_seed" in one
