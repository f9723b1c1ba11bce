"""Data and options as newcomers bring them, broken in many ways: one error each, with the file or key and the remedy.

Every source is read twice, as the stages read it and as ``hf-immunize plan`` looks at it; neither may raise anything
but an error of this package.
"""

from __future__ import annotations

import csv
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Picture
from transformers import ViTImageProcessorPil

from hf_immunize.data import Task, TaskArguments
from hf_immunize.errors import ConfigError, DataError, ImmunizeError
from hf_immunize.options import make_options, parse_options
from hf_immunize.stages.attack import AttackOptions
from hf_immunize.stages.base import ImmunizeOptions
from hf_immunize.stages.checks.options import refuse_bad_options
from hf_immunize.stages.checks.rows import check_rows
from hf_immunize.stages.workflow.run_file import RunFile
from hf_immunize.stages.workflow.stages import make_stages
from hf_immunize.training import ImmunizationConfig

PROCESSOR = ViTImageProcessorPil(size={"height": 8, "width": 8})
SOURCES: dict[str, tuple] = {}


def picture(path: Path, number: int = 0, size: tuple[int, int] = (8, 8), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(abs(hash((path.parent.name, number))) % 2**32).integers(0, 255, (*size, 3))
    Picture.fromarray(pixels.astype(np.uint8)).save(path, **options)
    return path


def classes(root: Path, *names: str, images: int = 6, suffix: str = ".png") -> Path:
    for name in names or ("cat", "dog"):
        for number in range(images):
            picture(root / name / f"{number}{suffix}", number)
    return root


def table(path: Path, rows: list[dict], **format_) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), **format_)
        writer.writeheader()
        writer.writerows(rows)
    return path


def listed(root: Path, **columns) -> list[dict]:
    """Rows that name six images, with further columns."""
    return [{"image": picture(root / "i" / f"{number}.png", number).relative_to(root).as_posix()}
            | {name: values[number % len(values)] for name, values in columns.items()} for number in range(6)]


def dataset(labels, feature=None, **more) -> Dataset:
    images = [Picture.fromarray(np.full((8, 8, 3), 20 * number, np.uint8)) for number in range(len(labels))]
    features = Features({"image": Image(), "label": feature or Value("int64")}
                        | {name: kind for name, (kind, _) in more.items()})
    return Dataset.from_dict({"image": images, "label": labels} | {name: values for name, (_, values) in more.items()},
                             features=features)


def shard(path: Path, root: Path) -> Path:
    """Six samples of an image and its class."""
    with tarfile.open(path, "w") as archive:
        for number in range(6):
            archive.add(picture(root / "kept" / f"{number}.png", number), f"{number}.png")
            (root / "cls").write_text(str(number % 2))
            archive.add(root / "cls", f"{number}.cls")
    return path


def parquet(root: Path, rows: Dataset) -> Path:
    rows.to_parquet(str(root / "rows.parquet"))
    return root / "rows.parquet"


def source(message: str, **options):
    """A maker of a malformed source, and what has to be said about it."""

    def note(make):
        SOURCES[make.__name__] = (make, message, options)
        return make

    return note


@source("got the folder .* with no files: check the path")
def empty_folder(root):
    return root


@source("got the folder .* with 1 .txt")
def only_text(root):
    (root / "notes.txt").write_text("x")
    return root


@source("there is no such file or folder. Check the path")
def missing(root):
    return root / "nowhere" / "at" / "all"


@source("got the file 'images.zip': convert or unpack it")
def zip_file(root):
    (root / "images.zip").write_bytes(b"PK")
    return root / "images.zip"


@source("expected samples in .*shard-000.tar, got an archive without files")
def an_empty_shard(root):
    (root / "shard-000.tar").write_bytes(b"\0" * 1024)
    return root / "shard-000.tar"


@source("expected a tar file of samples, got .*shard-000.tar")
def a_truncated_shard(root):
    shard(root / "shard-000.tar", root)
    (root / "shard-000.tar").write_bytes((root / "shard-000.tar").read_bytes()[:700])
    return root / "shard-000.tar"


@source("expected images, .cls, .json and .txt in .*shard-000.tar, got '0.pkl'")
def a_shard_with_a_pickle(root):
    (root / "0.pkl").write_bytes(b"cos\nsystem")
    with tarfile.open(root / "shard-000.tar", "w") as archive:
        archive.add(root / "0.pkl", "0.pkl")
    return root / "shard-000.tar"


@source("got the file 'mnist.npz'")
def npz_for_a_classifier(root):
    np.savez(root / "mnist.npz", x_train=np.zeros((2, 8, 8)), y_train=np.zeros(2))
    return root / "mnist.npz"


@source("expected at least two classes in the primary dataset, got .'cat'.*choose more labels")
def one_class(root):
    return classes(root, "cat")


@source("expected column 'label' in the primary dataset, got .*put the images of each class into a sub-folder")
def images_without_classes(root):
    for number in range(6):
        picture(root / f"{number}.png", number)
    return root


@source("expected at least 3 different images .*'dog'|fewer .*'dog'")
def a_class_of_one_image(root):
    classes(root, "cat")
    return classes(root, "dog", images=1)


@source("'dog'")
def a_class_of_equal_images(root):
    classes(root, "cat")
    for number in range(6):
        (root / "dog").mkdir(exist_ok=True)
        Picture.new("RGB", (8, 8)).save(root / "dog" / f"{number}.png")
    return root


@source("3.png.*(empty file|0 bytes)")
def zero_bytes(root):
    (classes(root) / "cat" / "3.png").write_bytes(b"")
    return root


@source("3.png.*remove or replace")
def truncated_png(root):
    path = classes(root) / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:-40])
    return root


@source("3.jpg.*remove or replace")
def truncated_jpeg(root):
    path = classes(root, suffix=".jpg") / "cat" / "3.jpg"
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    return root


@source("3.png.*(UnidentifiedImageError|cannot identify)")
def text_called_png(root):
    (classes(root) / "cat" / "3.png").write_text("<html>not found</html>")
    return root


@source("3.png.*(DecompressionBomb|MAX_IMAGE_PIXELS)")
def a_bomb(root):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (classes(root) / "cat" / "3.png").write_bytes(data)
    return root


@source("3.tif.*mode F")
def floating_point_image(root):
    classes(root)
    Picture.fromarray(np.random.default_rng(0).random((8, 8), dtype=np.float32)).save(root / "cat" / "3.tif")
    return root


@source("got cat/9.png in .*, a link to nothing: repair or remove it")
def a_link_to_nothing(root):
    (classes(root) / "cat" / "9.png").symlink_to(root / "gone.png")
    return root


@source("expected class folders or tables in .*, got both")
def folders_and_a_table(root):
    parquet(root, dataset([0, 1]))
    return classes(root)


@source("got both readings")
def splits_or_classes(root):
    classes(root / "train", "cat", "dog")
    picture(root / "test" / "0.png")
    return root


@source("expected a split that is in .*, got 'holdout': there is train. Set the split", primary_split="holdout")
def a_split_that_is_not_there(root):
    return classes(root)


@source(r"expected a split like train or train\[:100\].*got 'train\[", primary_split="train[10:")
def half_a_split(root):
    return classes(root)


@source("expected no revision 'v1' with a local source.*Unset it", primary_revision="v1")
def a_revision_of_a_folder(root):
    return classes(root)


@source("expected no config 'plain' with a single file", primary_config="plain")
def a_config_of_a_file(root):
    return parquet(root, dataset([0, 1]))


@source(r"got \['bird'\] in 'cat,bird'.*It has 2 classes: cat, dog", primary_labels="cat,bird")
def a_class_that_is_not_there(root):
    return classes(root)


@source("expected each class of the primary dataset once", primary_labels="cat,cat")
def a_class_twice(root):
    return classes(root)


@source("expected column 'breed' in the primary dataset.*set primary_label_column", primary_label_column="breed")
def a_column_that_is_not_there(root):
    return classes(root)


@source("expected splits like 'train=0.5,test=0.5', got 'half'", primary_splits="half")
def splits_without_numbers(root):
    return classes(root)


@source("sum to 1", primary_splits="train=0.5,validation=0.1,test=0.1")
def splits_that_do_not_sum(root):
    return classes(root)


@source("validation", primary_splits="train=0.5,test=0.5")
def splits_without_validation(root):
    return classes(root)


@source("rows.csv|two.csv")
def csv_without_labels(root):
    table(root / "rows.csv", listed(root))
    return root / "rows.csv"


@source("expected column 'image' in the primary dataset, got .'label', 'path'|column 'image'")
def csv_without_images(root):
    return table(root / "rows.csv", [{"label": number % 2, "path": f"gone{number}.jpeg"} for number in range(6)])


@source("expected an image file for every row in column 'image', got 'i/gone.png' in row 6")
def csv_with_a_missing_image(root):
    rows = listed(root, label=["a", "b"])
    return table(root / "rows.csv", [*rows, {"image": "i/gone.png", "label": "a"}])


@source("rows.csv")
def empty_csv(root):
    (root / "rows.csv").write_text("")
    return root / "rows.csv"


@source("column 'image'|rows.csv")
def csv_of_a_header(root):
    (root / "rows.csv").write_text("image,label\n")
    return root / "rows.csv"


@source("rows.csv")
def csv_that_is_binary(root):
    (root / "rows.csv").write_bytes(bytes(range(256)) * 10)
    return root / "rows.csv"


@source("rows.json")
def broken_json(root):
    (root / "rows.json").write_text('[{"image": ')
    return root / "rows.json"


@source("several labels for one image are not supported")
def lists_of_labels(root):
    rows = listed(root, label=[[0, 1]])
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "rows.jsonl"


@source("rows.parquet")
def truncated_parquet(root):
    path = parquet(root, dataset([0, 1] * 3))
    path.write_bytes(path.read_bytes()[:200])
    return path


@source("expected whole numbers from 0 on in column 'label' of the primary dataset, got 0.5 in row 0")
def labels_of_halves(root):
    return parquet(root, dataset([0.5, 1.0], Value("float32")))


@source("got -3 in row 1 .1 such rows.: repair the labels")
def negative_labels(root):
    return parquet(root, dataset([0, -3, 1]))


@source("at least two classes in the primary dataset, got .. and 4 rows without a label")
def no_labels_at_all(root):
    return parquet(root, dataset([None, -1, None, -1]))


@source("set primary_image_column or image_column to one of .'left', 'right'.")
def two_image_columns(root):
    rows = dataset([0, 1], right=(Image(), [Picture.new("RGB", (8, 8))] * 2)).rename_column("image", "left")
    return parquet(root, rows)


@source("set primary_label_column or label_column to one of .'fine_label', 'coarse_label'.")
def two_label_columns(root):
    rows = dataset([0, 1], coarse_label=(ClassLabel(names=["a", "b"]), [0, 1])).rename_column("label", "fine_label")
    return parquet(root, rows)


@source("i/gone.png")
def metadata_of_a_missing_file(root):
    rows = [{"file_name": row["image"], "label": row["label"]} for row in listed(root, label=["a", "b"])]
    table(root / "metadata.csv", [*rows, {"file_name": "i/gone.png", "label": "a"}])
    return root


@source("expected a README.md with a readable YAML block")
def a_broken_readme(root):
    parquet(root, dataset([0, 1]))
    (root / "README.md").write_text("---\nconfigs: [\n---\n")
    return root


@source("saved")
def half_a_save_to_disk(root):
    dataset([0, 1]).save_to_disk(str(root / "saved"))
    next((root / "saved").glob("*.arrow")).unlink()
    return root / "saved"


@source(r"expected builder:NAME, NAME in \['digits', 'mnist', 'scattered_digits'\].*got 'digit'")
def a_builder_nobody_knows(root):
    return "builder:digit"


@source("expected an importable function for builder:no.such:thing")
def a_builder_that_cannot_be_imported(root):
    return "builder:no.such:thing"


@source("expected a datasets.Dataset or DatasetDict from builder:os:getcwd, got str")
def a_builder_of_something_else(root):
    return "builder:os:getcwd"


@source("builder:os:_exit_nowhere|importable function")
def a_builder_without_its_function(root):
    return "builder:os:nothing_like_that"


@source("builder:tests_failing:build|builder")
def a_builder_that_fails(root):
    return "builder:tempfile:_get_default_tempdir_nowhere"


@pytest.mark.parametrize("name", SOURCES)
def test_a_malformed_source_is_one_error_with_its_remedy(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_IMMUNIZE_CACHE", str(tmp_path / "cache"))
    make, message, options = SOURCES[name]
    (tmp_path / "data").mkdir()
    arguments = TaskArguments(str(make(tmp_path / "data")), "builder:digits", **options)

    def read():
        task = Task(arguments, "primary")
        for split in ("train", "validation", "test"):
            rows = task.pixels(split, PROCESSOR)
            [rows[place] for place in range(len(rows))]

    with pytest.raises(DataError, match=f"(?s){message}"):
        read()
    _, found = check_rows(arguments)
    bad = [finding.told for finding in found if finding.level == "fails"]
    assert bad, f"plan found nothing: {found}"


def test_there_are_enough_of_them():
    assert len(SOURCES) >= 40


KINDS = (TaskArguments, ImmunizeOptions, ImmunizationConfig)
NEEDED = {"primary_dataset": "a", "harmful_dataset": "b", "base_path": "m", "output_dir": "o", "use_cpu": True}


@pytest.mark.parametrize(("options", "message"), [
    ({"strenght": 1}, r"unknown \['strenght'\].* Did you mean strength\?"),
    ({"LearningRate": 1}, r"unknown \['LearningRate'\]"),
    ({"learning_rate": "fast"}, "expected a number for learning_rate in run.yaml, got 'fast'"),
    ({"learning_rate": True}, "expected a number for learning_rate in run.yaml, got True"),
    ({"learning_rate": [1, 2]}, r"expected one value for learning_rate in run.yaml, got \[1, 2\]"),
    ({"learning_rate": {"a": 1}}, "expected one value for learning_rate in run.yaml"),
    ({"learning_rate": None}, "expected a value for learning_rate in run.yaml, got 'nothing'"),
    ({"max_steps": 2.5}, "expected a whole number for max_steps in run.yaml, got 2.5"),
    ({"max_steps": "many"}, "expected a number for max_steps in run.yaml"),
    ({"use_cpu": "perhaps"}, "use_cpu"),
    ({"objective": ["a", {"b": 1}]}, "expected one value for objective in run.yaml"),
    ({"strength": -1}, "strength"),
    ({"distillation": -1}, "distillation"),
    ({"max_primary_drop": "little"}, "expected a number for max_primary_drop"),
    ({"augmentation": "blur"}, "augmentation|blur"),
    ({"base_precision": "float16"}, "expected base_precision float32 or bfloat16, got 'float16'"),
    ({"per_device_harmful_batch_size": 0}, "per_device_harmful_batch_size"),
    ({"fp16": True}, "fp16"),
])  # fmt: skip
def test_a_malformed_option_of_a_file_names_its_key(options, message):
    with pytest.raises(ConfigError, match=message):
        make_options(KINDS, NEEDED | options, "run.yaml")


@pytest.mark.parametrize(("section", "message"), [
    ("immunize: {one: {objective: kappa}}", "expected objectives among .* got 'kappa'"),
    ("attack: {attacks: [lorra]}", "expected an attack in .* got 'lorra'"),
    ("attack: {settings: [lora.rnk=3]}", "expected a field of lora in .* got 'rnk'"),
    ("attack: {settings: [lora.rank=x]}", "expected int values in 'lora.rank=x'"),
    ("attack: {settings: lora}", "expected attack.field=value"),
    ("attack: {protocol: quik}", "expected a protocol in .* got 'quik'"),
    ("attack: {seeds: [0, 0]}", "expected at least one seed and none twice"),
    ("attack: {exam_levels: 3}", "expected no exam_levels for a classifier"),
    ("certify: {protocol: quik}", "expected a protocol in .* got 'quik'"),
    ("certify: {treshold: 1}", r"unknown \['treshold'\].* Did you mean threshold"),
    ("report: {outptu: x}", r"unknown \['outptu'\].* Did you mean output"),
])  # fmt: skip
def test_names_that_nobody_knows_are_found_before_the_run(tmp_path, section, message):
    text = "task: {primary_dataset: a, harmful_dataset: b}\nbase: m\n"
    text += "" if section.startswith("immunize") else "immunize: {one: {objective: ill_only}}\n"
    (tmp_path / "run.yaml").write_text(text + section + "\n")
    run = RunFile.read(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=f"(?s){message}") as told:
        refuse_bad_options(run, make_stages(run))
    assert f"section {section.split(':')[0]}" in str(told.value) and "run.yaml" in str(told.value)


def test_a_required_option_that_is_not_there_names_key_and_file():
    with pytest.raises(ConfigError, match="expected these options as well: .*base_path.* in run.yaml"):
        make_options(KINDS, {name: value for name, value in NEEDED.items() if name != "base_path"}, "run.yaml")


def test_values_that_yaml_writes_otherwise_are_what_they_mean():
    """1e-4 is text for YAML, no is false, a list stands for text with commas, one word for a list of one."""
    told = {"learning_rate": "1e-4", "horizon": [30, 300], "eval_strategy": False, "max_steps": 3.0, "weight": 1}
    task, _, config = make_options(KINDS, NEEDED | told | {"primary_labels": ["a, b", "c"]}, "run.yaml")
    assert config.learning_rate == 1e-4 and config.horizon == "30,300" and config.max_steps == 3
    assert config.eval_strategy == "no" and config.weight == "1" and task.primary_labels == ["a, b", "c"]
    (attack,) = make_options((AttackOptions,), {"model_path": "m", "attacks": "lora", "seeds": 3}, "run.yaml")
    assert attack.attacks == ["lora"] and attack.seeds == [3]


def test_an_unknown_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit):
        parse_options(KINDS, ["--primary-dataset=a", "--harmful_dataset=b", "--base_path=m", "--output_dir=o",
                              "--strenght=1", "--max_primry_drop", "1"])
    assert "Did you mean --strength, --max_primary_drop?" in capsys.readouterr().err


HURRY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@HURRY
@given(data=st.binary(max_size=300), suffix=st.sampled_from([".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow"]))
def test_any_bytes_as_a_table_are_rows_or_one_error(tmp_path_factory, data, suffix):
    path = tmp_path_factory.mktemp("table") / f"rows{suffix}"
    path.write_bytes(data)
    with pytest.raises(ImmunizeError):
        Task(TaskArguments(str(path), "builder:digits"), "primary").pixels("train", PROCESSOR)


@HURRY
@given(data=st.binary(max_size=300), suffix=st.sampled_from([".png", ".jpg", ".webp", ".gif", ".bmp", ".tif"]))
def test_any_bytes_as_an_image_are_named(tmp_path_factory, data, suffix):
    root = classes(tmp_path_factory.mktemp("images"))
    (root / "cat" / f"odd{suffix}").write_bytes(data)
    with pytest.raises(DataError, match=f"odd{suffix}"):
        Task(TaskArguments(str(root), "builder:digits"), "primary")
    _, found = check_rows(TaskArguments(str(root), "builder:digits"))
    assert [finding for finding in found if finding.level == "fails" and f"odd{suffix}" in finding.told]


WORDS = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                     lambda inner: st.lists(inner, max_size=3)
                     | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6)
SECTIONS = ["task", "base", "pretrain", "immunize", "attack", "certify", "report", "jobs", "output_dir", "hardware",
            "judge", "benign", "scratch", "base_revision"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(told=st.dictionaries(st.sampled_from(SECTIONS), WORDS, max_size=6))
def test_any_values_in_a_run_file_are_stages_or_one_error(tmp_path, told):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(told), encoding="utf-8")
    try:
        make_stages(RunFile.read(path))
    except ConfigError as error:
        assert "run.yaml" in str(error)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(["learning_rate", "max_steps", "objective", "strength", "horizon", "use_cpu", "sites",
                             "primary_labels", "split_seed", "weight", "ema_decay"]), value=WORDS)
@pytest.mark.slow
def test_any_value_of_an_option_is_taken_or_named(name, value):
    try:
        make_options(KINDS, NEEDED | {name: value}, "run.yaml")
    except (ConfigError, ValueError) as error:
        assert name in str(error) or repr(value)[:20] in str(error), error


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path):
    classes(tmp_path)
    (tmp_path / "cat").chmod(0)
    with pytest.raises(DataError, match="expected a folder that can be read, got .*cat: Permission denied"):
        Task(TaskArguments(str(tmp_path), "builder:digits"), "primary")
