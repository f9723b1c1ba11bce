"""Folders of users: what a stage did not make it neither deletes nor writes over."""

import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image as Picture

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))

from published import certified
from safetensors.torch import save_file
from vision_builders import build_classifier

from hf_immunize.errors import ConfigError, DataError, ModelError, RecordError, RunMismatchError
from hf_immunize.models import load_classifier, random_classifier
from hf_immunize.records import ModelFingerprint, begin_run
from hf_immunize.stages.api.places import place_data, place_model
from hf_immunize.stages.cards import CardsOptions, write_cards
from hf_immunize.stages.fetch import FetchOptions, fetch_model
from hf_immunize.stages.pretrain_classifier import ClassifierOptions, _weights_of


@pytest.fixture
def model(tmp_path):
    build_classifier("vit").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def held(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_that_is_where_it_is_brought_to_stays(model):
    before = held(model)
    fetch_model(FetchOptions(str(model), str(model)))
    assert place_model(str(model), model) == model
    assert held(model) == before


def test_weights_written_over_in_place_leave_what_was_fetched_alone(tmp_path):
    """As ``cp`` does; of a large file as of a small one."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file({"weight": torch.zeros(2**19)}, model / "model.safetensors")
    fetch_model(FetchOptions(str(model), str(tmp_path / "copy")))
    before = held(tmp_path / "copy")
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"abcd")
    assert held(tmp_path / "copy") == before and held(model)["model.safetensors"] != before["model.safetensors"]


def test_the_folder_of_somebodys_model_is_no_output_folder(model):
    before = held(model)
    with pytest.raises(RunMismatchError, match=r"got config.json, model.safetensors, which no stage left there"):
        begin_run(model, "immunize", {"base": "x"})
    (model.parent / "run" / "checkpoint-500").mkdir(parents=True)
    with pytest.raises(RunMismatchError, match="got checkpoint-500"):
        begin_run(model.parent / "run", "pretrain", {})
    assert held(model) == before


def rows(number=0):
    return Dataset.from_dict({"image": [Picture.new("RGB", (4, 4), (number, 0, 0))] * 3, "label": [0, 1, 0]})


def test_a_dataset_in_memory_is_written_over_no_folder_of_others(tmp_path):
    own = tmp_path / "data" / "primary"
    own.mkdir(parents=True)
    (own / "photo.png").write_bytes(b"mine")
    with pytest.raises(DataError, match="a folder that is there and not from an earlier call"):
        place_data(rows(), own)
    assert (own / "photo.png").read_bytes() == b"mine"


def test_what_a_call_wrote_a_later_one_writes_again_even_from_itself(tmp_path):
    from datasets import load_from_disk

    place = tmp_path / "data" / "primary"
    place_data(rows(7), place)
    place_data(load_from_disk(str(place)), place)
    assert load_from_disk(str(place))[0]["image"].getpixel((0, 0)) == (7, 0, 0)


def test_a_transform_cannot_be_written():
    with pytest.raises(DataError, match="got one with a transform"):
        place_data(rows().with_transform(lambda batch: batch), Path("nowhere"))


@pytest.mark.parametrize("output", ["", "{model}"])
def test_cards_replace_no_model(tmp_path, output):
    folder = certified(tmp_path / "made", "one")
    before = held(folder)
    place = folder.parent if not output else folder
    with pytest.raises(ConfigError, match="expected another place for cards than the models"):
        write_cards(CardsOptions([str(folder)], str(place)))
    assert held(folder) == before
    (written,) = write_cards(CardsOptions([str(folder)], str(tmp_path / "cards")))
    assert written == tmp_path / "cards" / folder.name / "README.md" and written.is_file()


def test_models_of_one_name_are_told_apart_by_their_weights(model):
    options = ClassifierOptions(model_name_or_path=str(model))
    before = _weights_of(str(model), options)
    other = build_classifier("vit")
    torch.nn.init.ones_(other.classifier.weight)
    other.save_pretrained(model)
    assert _weights_of(str(model), options) != before and list(before["weights"]) == ["model.safetensors"]


def test_a_configuration_is_part_of_what_was_attacked(model):
    def found():
        return ModelFingerprint.of_folder(model, name="m", architecture="a", parameters=1)

    before, text = found(), (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e30'))
    assert not found().is_same(before) and found().weights == before.weights
    assert found().is_same(before.model_copy(update={"configuration": None})), "records of earlier releases"
    told = '"_name_or_path": "x", "transformers_version"'
    (model / "config.json").write_text(text.replace('"transformers_version"', told))
    assert found().is_same(before)


@pytest.mark.parametrize("entry", ['"configuration_files": ["c.json"]', '"_attn_implementation": "some/kernel"'])
def test_a_configuration_says_everything_itself(model, entry):
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace("{", f"{{{entry},", 1))
    with pytest.raises(ModelError, match="expected a config.json that says everything itself"):
        load_classifier(model)


def test_what_is_drawn_anew_is_drawn_as_the_architecture_does(model):
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace('"initializer_range": 0.02', '"initializer_range": 1000.0'))
    wide, usual = (random_classifier(model, 0, as_usual=told) for told in (False, True))
    sizes = [float(found.vit.layers[0].mlp.fc1.weight.detach().std()) for found in (wide, usual)]
    assert sizes[0] > 100 and sizes[1] < 0.1


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path):
    from hf_immunize.training.vision.checkpointing import checkpoint_for

    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{")
    assert checkpoint_for(True, tmp_path, 0) == str(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "trainer_state.json").unlink()
    with pytest.raises(RecordError, match="expected a whole checkpoint"):
        checkpoint_for(True, tmp_path, 0)
    with pytest.raises(RecordError, match="Make a new trainer with the base"):
        checkpoint_for(None, tmp_path, 12)


def test_rows_with_both_columns_are_labelled_by_labels():
    from hf_immunize.data import collate_pixels
    from hf_immunize.training.vision.collators import collate_with_labels

    made = [{"pixel_values": torch.zeros(3, 2, 2), "label": 7, "labels": row} for row in range(3)]
    assert collate_pixels(made)["labels"].tolist() == [0, 1, 2]
    found = collate_with_labels(collate_pixels, "regression")(made)
    assert found["labels"].tolist() == [0, 1, 2] and "label" not in found


def test_a_labels_attribute_has_a_label_for_each_row():
    from hf_immunize.data import find_labels

    class Rows(torch.utils.data.Dataset):
        labels = torch.zeros(3, dtype=torch.long)

        def __len__(self):
            return 4

        def __getitem__(self, row):
            return {"pixel_values": torch.zeros(3, 2, 2), "labels": 0}

    with pytest.raises(DataError, match="expected as many labels as rows in the attribute labels of rows, 4, got 3"):
        find_labels(Rows(), "rows")
