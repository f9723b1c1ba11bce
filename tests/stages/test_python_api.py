"""The main job from Python: models and data in memory, in folders, as pipelines; results as tables, pages, folders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture
from pipeline_builders import build_text_pipeline
from sklearn.datasets import load_digits
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

import hf_immunize
from hf_immunize import Exam, ExamResult, ImmunizationConfig, ImmunizationTrainer, immunize
from hf_immunize.data import PixelDataset, Task, TaskArguments
from hf_immunize.errors import ConfigError, DataError, ModelError
from hf_immunize.records import Certificate, ImmunizationRecord

SMALL = {"seeds": [0, 1], "attacks": ["ridge_probe"], "settings": ["ridge_probe.penalty=1"]}
PUBLIC = [
    "DiffusionImmunizationConfig", "DiffusionImmunizationTrainer", "Exam", "ExamResult", "ImmunizationConfig",
    "ImmunizationTrainer", "LinearImmunizer", "Term", "__version__", "add_head", "immunize", "load_verified", "profile",
    "publish",
    "register_attack", "register_family", "register_objective", "render_report", "verify_folder", "weight_term",
]  # fmt: skip


def digits(labels):
    """Real digits of some classes as a Dataset in memory."""
    held = load_digits()
    rows = [row for label in labels for row in np.flatnonzero(held.target == label)[:24]]
    features = Features({"img": Image(), "digit": ClassLabel(names=[str(label) for label in labels])})
    images = [Picture.fromarray(np.round(held.images[row] * 255 / 16).astype(np.uint8)) for row in rows]
    names = [list(labels).index(held.target[row]) for row in rows]
    return Dataset.from_dict({"img": images, "digit": names}, features=features)


@pytest.fixture
def processor():
    return ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def test_the_public_names_are_these_and_are_there():
    assert sorted(hf_immunize.__all__) == PUBLIC == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(hf_immunize, name) is not None
    assert dir(hf_immunize) == hf_immunize.__all__
    with pytest.raises(AttributeError, match="has no attribute 'Examn'"):
        hf_immunize.Examn  # noqa: B018


def test_models_and_data_in_memory_from_immunize_to_a_result(tmp_path, make_vit, processor):
    """A backbone with a head of other classes gets a new one; the exam reads what was saved."""
    keep, harm = digits(range(5)), digits(range(5, 8))
    model = make_vit(labels=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = immunize(model, keep, harm, output_dir=tmp_path / "job", processing_class=processor, max_steps=2,
                    per_device_harmful_batch_size=20, use_cpu=True, report_to="none")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    record = made.record
    assert isinstance(record, ImmunizationRecord) and record.steps == 2 and "IMMUNIZED" in str(made)
    assert AutoModelForImageClassification.from_pretrained(made.folder).config.id2label[4] == "4"
    again = immunize(model, keep, harm, output_dir=tmp_path / "job", processing_class=processor, max_steps=2,
                     per_device_harmful_batch_size=20, use_cpu=True, report_to="none")
    assert again.record == record, "a second call finds what is there"
    base = AutoModelForImageClassification.from_pretrained(made.base)
    exam = Exam(made.folder, base=base, primary=keep, harmful=harm,
                protocol="quick", attack=SMALL, processing_class=processor, output_dir=tmp_path / "exam", device="cpu")
    result = exam.run()
    assert isinstance(result, ExamResult) and isinstance(result.certificate, Certificate)
    assert result.certificate.subject.weights == record.model.weights
    (row,) = [row for row in result.rows() if row["verdict"] != "NOT RUN"]
    assert row["attack"] == "ridge_probe" and row["accuracy_drop"] is not None
    assert "ridge_probe" in str(result) and result.table() is not None
    shown = result._repr_html_()
    assert shown.startswith("<table>") and f"<b>{result.certificate.overall}</b>" in shown and "ridge_probe" in shown
    assert result.report().stat().st_size > 10_000 and result.report(tmp_path / "page.html").is_file()
    saved = result.save(tmp_path / "mine")
    assert hf_immunize.verify_folder(saved).sound and (saved / "immunization.json").is_file()
    with pytest.raises(FileExistsError):
        result.save(tmp_path / "mine")
    assert not (made.folder / "traces").exists(), "the exam works on copies"


def test_a_notebook_gets_no_markup_from_names(tmp_path):
    class Cell:
        attack = family = verdict = "<script>alert(1)</script>"
        unit = "solve"

        class accuracy_drop:
            estimate = 0.5

    class Told:
        cells = [Cell]
        overall = "<b>FAILS"

        class subject:
            name = "<img src=x>"

        control = subject

        class utility:
            metric, base, immunized = "accuracy", 1.0, 1.0

    shown = ExamResult(Told, tmp_path, tmp_path)._repr_html_()
    assert "<script>" not in shown and "<img" not in shown and "&lt;script&gt;" in shown


def test_the_trainer_certifies_what_it_saved(tmp_path, make_vit, processor):
    keep, harm = digits(range(3)), digits(range(5, 8))
    keep.save_to_disk(tmp_path / "keep")
    harm.save_to_disk(tmp_path / "harm")
    model = make_vit(labels=3)
    base = make_vit(labels=3)
    for one in (model, base):
        one.config.id2label = {0: "0", 1: "1", 2: "2"}
    arguments = TaskArguments(str(tmp_path / "keep"), str(tmp_path / "harm"))
    primary, harmful = Task(arguments, "primary"), Task(arguments, "harmful")
    args = ImmunizationConfig(str(tmp_path / "out"), objective="ill_only", max_steps=1, use_cpu=True, report_to="none",
                              per_device_harmful_batch_size=20, save_strategy="no")
    trainer = ImmunizationTrainer(
        model=model, args=args, train_dataset=primary.pixels("train", processor),
        harmful_dataset=harmful.pixels("defense", processor), processing_class=processor,
    )
    assert isinstance(trainer.harmful_dataset, PixelDataset)
    trainer.train()
    result = trainer.certify(base=base, primary=tmp_path / "keep", harmful=harm, protocol="quick", attack=SMALL,
                             device="cpu")
    assert result.folder == tmp_path / "out" and (tmp_path / "out" / "certificate.json").is_file()
    roles = {path.parent.name for path in (tmp_path / "out").rglob("traces/*/*.json")}
    assert roles == {"subject", "control", "nothing"}


@pytest.mark.slow
def test_a_pipeline_in_memory(tmp_path):
    folders = {}
    for place, (name, count) in enumerate({"retain": 10, "harmful": 12}.items()):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        for number in range(count):
            pixels = np.random.default_rng(100 * place + number).integers(0, 255, (16, 16, 3)).astype(np.uint8)
            Picture.fromarray(pixels).save(folders[name] / f"{number}.png")
    base = build_text_pipeline("StableDiffusionPipeline")
    task = {"retain_prompt": "a photo of cat", "harmful_prompt": "a photo of sks dog", "resolution": 16}
    made = immunize(base, folders["retain"], folders["harmful"], output_dir=tmp_path / "job", task=task, max_steps=1,
                    attacker_steps=1, gradient_accumulation_steps=1, use_cpu=True, disable_progress=True,
                    gradient_checkpointing=False, max_primary_drop=1e6)
    small = {"seeds": [0, 1], "trials": 0, "tuning_seeds": 0, "exam_levels": 2, "pictures": 0,
             "attacks": ["diffusion_full_finetune"],
             "settings": ["diffusion_full_finetune.steps=2", "diffusion_full_finetune.learning_rate=1e-3",
                          "diffusion_full_finetune.batch_size=3"]}
    result = Exam(made.folder, base=base, primary=folders["retain"], harmful=folders["harmful"], task=task,
                  attack=small, protocol="diffusion_quick", certify={"judged_images": 4, "draw_steps": 2}, device="cpu",
                  output_dir=tmp_path / "exam").run()
    assert {row["attack"] for row in result.rows() if row["verdict"] != "NOT RUN"} == {"diffusion_full_finetune"}


def test_what_is_refused_says_what_to_give(tmp_path, make_vit, processor):
    keep, harm = digits(range(3)), digits(range(5, 8))
    common = {"base": make_vit(), "primary": keep, "harmful": harm, "output_dir": tmp_path,
              "processing_class": processor}
    with pytest.raises(ModelError, match="expected processing_class with a loaded ViTForImageClassification, got none"):
        Exam(make_vit(), **{**common, "processing_class": None})
    with pytest.raises(ModelError, match="expected a folder, a Hub id, a model of transformers .* got int"):
        Exam(3, **common)
    with pytest.raises(DataError, match="expected a folder, a table, a Hub id or a datasets.Dataset .* got list"):
        Exam(make_vit(), **{**common, "primary": [1, 2]})
    with pytest.raises(ConfigError, match=r"unknown \['sedes'\]: see --help. Did you mean seeds\?"):
        Exam(make_vit(), **common, attack={"sedes": [1]})
    with pytest.raises(ConfigError, match=r"unknown \['primary_label'\].* Did you mean primary_labels\?"):
        Exam(make_vit(), **common, task={"primary_label": "0"})
    with pytest.raises(ConfigError, match="expected a protocol in .*, got 'standart'"):
        Exam(make_vit(), **common, protocol="standart")
    with pytest.raises(ConfigError, match="expected an attack in .*, got 'lorra'. Did you mean lora?"):
        Exam(make_vit(), **common, attack={"attacks": ["lorra"]})
    with pytest.raises(DataError, match="got one task for both"):
        immunize(make_vit(labels=3), keep, keep, processing_class=processor, max_steps=3)
    with pytest.raises(ConfigError, match=r"unknown \['max_step'\].* Did you mean max_steps\?"):
        immunize(make_vit(labels=3), keep, harm, processing_class=processor, max_step=3)
