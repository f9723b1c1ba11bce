"""Each side has its own columns and revision; where none is named the only candidate is taken."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Features, Image, Value
from image_builders import table, write_images

from hf_immunize.data import Task, TaskArguments, find_columns
from hf_immunize.data.sources import commit_of
from hf_immunize.diffusion.tasks import ConceptArguments, ConceptTask
from hf_immunize.errors import DataError
from hf_immunize.tasks import ClassesTask


@pytest.fixture
def cifar(tmp_path):
    """Columns as CIFAR-100 has them."""
    data = table(60, columns=("img", "fine_label"))
    coarse = data.add_column("coarse_label", [0, 0] * 30)
    features = Features({**data.features, "coarse_label": ClassLabel(names=["animal"])})
    coarse.cast(features).to_parquet(tmp_path / "cifar.parquet")
    return str(tmp_path / "cifar.parquet")


@pytest.fixture
def usual(tmp_path):
    table(60, start=100, names=("x", "y")).to_parquet(tmp_path / "usual.parquet")
    return str(tmp_path / "usual.parquet")


def test_two_datasets_with_columns_of_different_names_are_used_together(cifar, usual):
    arguments = TaskArguments(usual, cifar, harmful_image_column="img", harmful_label_column="fine_label")
    assert Task(arguments, "primary").label_names == ["x", "y"]
    harmful = Task(arguments, "harmful")
    assert harmful.label_names == ["a", "b"]

    def processor(images, return_tensors):
        import numpy as np
        import torch

        return {"pixel_values": torch.stack([torch.from_numpy(np.array(image)).float() for image in images])}

    assert sum(len(harmful.pixels(role, processor)) for role in ("defense", "attack", "validation", "test")) == 60


def test_shared_columns_go_on_working_and_the_own_one_goes_before_them(cifar, usual):
    shared = TaskArguments(cifar, cifar, image_column="img", label_column="fine_label")
    assert Task(shared, "primary").label_names == ["a", "b"]
    own = TaskArguments(usual, cifar, image_column="img", label_column="fine_label", primary_image_column="image",
                        primary_label_column="label")
    assert Task(own, "primary").label_names == ["x", "y"] and Task(own, "harmful").label_names == ["a", "b"]


def found(features: dict, image=None, label=None, shared=("image", "label"), side="primary"):
    from datasets import Dataset

    data = Dataset.from_dict({name: [] for name in features}, Features(features))
    return find_columns(data, image, label, side=side, shared=shared)


TEXT, KIND, PICTURE = Value("string"), ClassLabel(names=["a"]), Image()


@pytest.mark.parametrize("features,columns", [
    ({"image": PICTURE, "label": KIND}, ("image", "label")),
    ({"img": PICTURE, "labels": Value("int64")}, ("img", "labels")),
    ({"photo": PICTURE, "breed": KIND, "text": TEXT}, ("photo", "breed")),
    ({"photo": PICTURE, "Category": TEXT, "id": Value("int64")}, ("photo", "Category")),
    ({"image": PICTURE, "mask": PICTURE, "label": KIND, "fine_label": KIND}, ("image", "label")),
])
def test_a_column_that_is_not_called_as_usual_is_found_where_it_is_the_only_one(features, columns):
    assert found(features) == columns


@pytest.mark.parametrize("features,options,message", [
    ({"img": PICTURE, "fine_label": KIND, "coarse_label": KIND}, {},
     r"column 'label' in the primary dataset, .*primary_label_column .* one of \['fine_label', 'coarse_label'\]"),
    ({"left": PICTURE, "right": PICTURE, "label": KIND}, {},
     r"column 'image' .* set primary_image_column or image_column to one of \['left', 'right'\]"),
    ({"img": PICTURE, "label": KIND}, {"image": "photo"}, r"'photo' .*got \['img', 'label'\]: set primary_image"),
    ({"image": TEXT, "id": Value("int64")}, {}, "column 'label' .*set primary_label_column or label_column"),
    ({"pixels": TEXT, "label": KIND}, {}, "column 'image' .*set primary_image_column or image_column"),
    ({"image": PICTURE}, {}, "put the images of each class into a sub-folder"),
])
def test_no_candidate_or_several_are_listed_with_the_option(features, options, message):
    with pytest.raises(DataError, match=message):
        found(features, **options)


def test_a_folder_without_classes_says_how_to_make_them(tmp_path):
    source = str(write_images(tmp_path, ["1.png", "2.png"]))
    with pytest.raises(DataError, match="put the images of each class into a sub-folder"):
        Task(TaskArguments(source, source), "primary")


def test_each_side_has_its_own_revision(monkeypatch):
    import datasets

    asked = {}

    def load(source, config, split, revision):
        asked[source] = revision
        return table(60)

    monkeypatch.setattr(datasets, "load_dataset", load)
    arguments = TaskArguments("o/primary", "o/harmful", benign_dataset="o/benign", primary_revision="v1",
                              harmful_revision="0a1b", benign_revision="main")
    for side in ("primary", "harmful", "benign"):
        Task(arguments, side)
    assert asked == {"o/primary": "v1", "o/harmful": "0a1b", "o/benign": "main"}


def test_a_certificate_names_the_commit_that_was_read_whatever_branch_was_asked_for(monkeypatch):
    import datasets

    def load(source, config, split, revision):
        held, commit = table(60), {"o/moves": "ab" * 20, "o/pinned": "cd" * 20}[source]
        held.info.download_checksums = {f"hf://datasets/{source}@{commit}/data/train-0.parquet": {"num_bytes": 9}}
        return held

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = ClassesTask(TaskArguments("o/moves", "o/pinned", harmful_revision="cd" * 20), None)
    for side in task.sides:
        task.side(side)
    assert "primary_revision" not in task.described(), "a run is known by what was asked for"
    assert task.located() == task.described() | {"primary_revision": "ab" * 20, "harmful_revision": "cd" * 20}
    assert TaskArguments(**task.located()).primary_revision == "ab" * 20


def test_rows_that_come_from_no_hub_have_no_commit():
    held = table(60)
    assert commit_of(held) is None
    held.info.download_checksums = {"https://somewhere/x.zip": {}, "hf://datasets/a/b@main/x.parquet": {}}
    assert commit_of(held) is None


def test_options_that_are_off_do_not_change_what_a_run_is_known_by():
    plain = TaskArguments("a", "b").described()
    assert not [name for name in plain if "column" in name and name not in ("image_column", "label_column")]
    assert "drop_rare_classes" not in plain and "primary_revision" not in plain
    changed = TaskArguments("a", "b", primary_revision="v1", drop_rare_classes=True).described()
    assert changed == plain | {"primary_revision": "v1", "drop_rare_classes": True}


def test_classes_of_a_diffusion_model_are_chosen_by_name_in_any_columns(tmp_path):
    table(90, names=("cat", "dog", "owl"), columns=("img", "fine_label")).to_parquet(tmp_path / "x.parquet")
    arguments = ConceptArguments(str(tmp_path / "x.parquet"), image_size=8, channels=3, retain_labels="owl",
                                 harmful_labels="cat", benign_labels="1")
    task = ConceptTask(arguments)
    held = {side: set(task.examples(side, "test").labels.tolist()) for side in ("retain", "harmful", "benign")}
    assert held == {"retain": {2}, "harmful": {0}, "benign": {1}}
    arguments.benign_labels = "2"
    with pytest.raises(DataError, match=r"each class on one side, got \[2\] twice"):
        ConceptTask(arguments)


def test_names_and_ids_go_on_over_several_sources_of_a_diffusion_model(tmp_path, warned):
    for name, start, names in (("one", 0, ("0", "1")), ("two", 100, ("shoe", "bag"))):
        table(60, start=start, names=names).to_parquet(tmp_path / f"{name}.parquet")
    arguments = ConceptArguments(f"{tmp_path / 'one.parquet'},{tmp_path / 'two.parquet'}", image_size=8, channels=3,
                                 retain_labels="0,1", harmful_labels="bag", benign_labels="2")
    task = ConceptTask(arguments)
    assert set(task.examples("harmful", "attack").labels.tolist()) == {3}
    assert set(task.examples("benign", "attack").labels.tolist()) == {2}
    assert task.label_names == ["0", "1", "2", "3"]
    assert warned()[-1].endswith("retain: 0 '0', 1 '1'; harmful: 3 'bag'; benign: 2 'shoe'.")
