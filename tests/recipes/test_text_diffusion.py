"""Text-to-image recipes from photo folders to a certificate, on a tiny random pipeline: plumbing, no claim."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from pipeline_builders import autoencoder, build_text_pipeline
from typer.testing import CliRunner

from hf_immunize.attacks import parse_settings
from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, DIFFUSION_TRAINABILITY
from hf_immunize.cli import app
from hf_immunize.diffusion import differences, load_pipeline
from hf_immunize.diffusion.encoding import encode_pixels, encode_prompt
from hf_immunize.diffusion.photos import read_captions
from hf_immunize.diffusion.prompts import PromptArguments, PromptTask
from hf_immunize.errors import DataError, ModelError
from hf_immunize.exam import DIFFUSION_PROTOCOLS
from hf_immunize.exam.checklist import _DIFFUSION_MISSING, _NEVER
from hf_immunize.records import AttackTrace, Certificate, ImmunizationRecord

RECIPES = Path(__file__).parents[2] / "recipes"
COUNTS = {"retain": 10, "harmful": 12, "benign": 9, "other": 3}


@pytest.fixture
def photos(tmp_path):
    """Folders of noise, darker or brighter from concept to concept."""
    for place, (name, count) in enumerate(COUNTS.items()):
        (tmp_path / name).mkdir()
        for number in range(count):
            pixels = np.random.default_rng(100 * place + number).integers(50 * place, 50 * place + 90, (20, 24, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / f"{number}.png")
    return tmp_path


@pytest.fixture
def task_words(photos):
    prompts = {"retain": "a photo of cat", "harmful": "a photo of sks dog", "benign": "a photo of person",
               "other": "a portrait of sks", "placeholder": "a photo of ohwx", "generic": "a photo"}
    words = [f"--{name}_images={photos / name}" for name in COUNTS]
    return [*words, *(f"--{name}_prompt={text}" for name, text in prompts.items()), "--resolution=16"]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))

    def call(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(RECIPES / f"{name}_text_diffusion.py"))["main"]()

    return call


SMALL = ["--seeds", "0", "1", "--trials=0", "--tuning_seeds=0", "--exam_levels=2", "--pictures=4", "--device=cpu"]


def settings(names):
    fields = {"steps": 3, "learning_rate": "3e-3", "batch_size": 3}
    return ["--settings", *(f"{name}.{field}={value}" for name in names for field, value in fields.items())]


@pytest.mark.slow
def test_from_photos_to_a_certificate(photos, task_words, run):
    base, model = photos / "base", photos / "model"
    build_text_pipeline("StableDiffusionPipeline").save_pretrained(base)
    run("immunize", *task_words, f"--base_path={base}", f"--output_dir={model}", "--objective=simulated_attack",
        "--attacker_steps=1", "--max_steps=2", "--per_device_train_batch_size=3", "--per_device_harmful_batch_size=3",
        "--attacker_conditions=none", "--learning_rate=1e-3", "--max_loss_factor=100", "--eval_steps=1",
        "--use_cpu=true", "--disable_progress=true")
    record = ImmunizationRecord.read(model / "immunization.json")
    seen = {found.role: found.sha256 for found in record.data}
    assert set(seen) == {"retain train", "retain validation", "harmful defense"}
    assert str(photos) not in (model / "immunization.json").read_text(encoding="utf-8")
    for folder, role in ((base, "control"), (model, "subject")):
        words = [*task_words, f"--model_path={folder}", f"--role={role}", *SMALL]
        run("attack", *words, "--protocol=diffusion_standard", *settings(DIFFUSION_ATTACKS), "diffusion_lora.rank=2")
        run("attack", *words, "--concept=benign", *settings(DIFFUSION_TRAINABILITY))
    traces = [AttackTrace.read(path) for path in (model / "traces" / "subject").glob("*.json")]
    assert {trace.attack for trace in traces} >= set(DIFFUSION_ATTACKS)
    assert {trace.outcome for trace in traces} == {"completed"}
    held = {found.sha256 for trace in traces for found in trace.data}
    assert held.isdisjoint(seen.values()), "the defender has seen a split of the exam"
    run("certify", *task_words, f"--model_path={model}", f"--base_path={base}", "--protocol=diffusion_standard",
        "--judged_images=4", "--draw_steps=2", "--device=cpu", "--threshold=-100")
    certificate = Certificate.read(model / "certificate.json")
    assert {cell.attack for cell in certificate.cells if cell.subject is not None} == set(DIFFUSION_ATTACKS)
    assert certificate.benign_data and len(certificate.trainability) == 2
    assert not {*_DIFFUSION_MISSING.values(), *_NEVER} & set(certificate.not_run)
    assert (model / "README.md").is_file() and DiffusionPipeline.from_pretrained(model, use_safetensors=True)

    told = CliRunner().invoke(app, ["verify", str(model)])
    assert told.exit_code == 0, told.output
    run("certify", *task_words, f"--model_path={model}", f"--base_path={base}", "--protocol=diffusion_standard",
        "--recheck=1", "--device=cpu")
    load_pipeline(base).vae.bfloat16().float().save_pretrained(model / "vae")  # other files, and numbers
    with pytest.raises(ModelError, match="differ in their denoisers alone, got other vae: the exam asks both"):
        run("certify", *task_words, f"--model_path={model}", f"--base_path={base}", "--device=cpu")


def test_what_two_pipelines_do_not_share_is_found_whatever_files_they_come_from(tmp_path):
    base = build_text_pipeline("StableDiffusionPipeline")
    base.vae.bfloat16().float()  # numbers that both precisions hold
    base.save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base" / "vae", tmp_path / "base" / "vae_1_0")

    def again(folder="base"):
        return load_pipeline(tmp_path / folder)

    half = again()
    half.vae.bfloat16()
    half.save_pretrained(tmp_path / "half")
    assert differences(again("half"), again()) == []
    changes = {
        "scheduler": lambda pipeline: pipeline.scheduler.register_to_config(prediction_type="v_prediction"),
        "vae": lambda pipeline: pipeline.vae.register_to_config(scaling_factor=5.0),
        "text_encoder": lambda pipeline: pipeline.text_encoder.get_input_embeddings().weight.data.add_(1),
        "tokenizer": lambda pipeline: pipeline.tokenizer.add_tokens(["new"]),
        "unet": lambda pipeline: pipeline.unet.conv_in.weight.data.add_(1),
    }
    for name, change in changes.items():
        changed = again()
        change(changed)
        assert differences(changed, again()) == ([] if name == "unet" else [name])


def test_a_photo_in_two_folders_and_images_beside_sub_folders_are_refused(photos, task_words):
    words = dict(word.removeprefix("--").split("=", 1) for word in task_words) | {"resolution": 16}
    pipeline = build_text_pipeline("DiTPipeline")
    numbers = {name: str(place) for place, name in enumerate(words) if name.endswith("_prompt")}
    for option in ("retain_images", "benign_images", "other_images"):
        wrong = PromptArguments(**words | numbers | {option: words["harmful_images"]})
        with pytest.raises(DataError, match="expected each photo in one folder, got one both in those of"):
            PromptTask(wrong, pipeline).examples("harmful", "attack")
    shutil.copytree(photos / "other", photos / "harmful" / "thumbs")
    with pytest.raises(DataError, match="images or sub-folders in 'harmful', one for each concept, got both"):
        PromptTask(PromptArguments(**words | numbers), pipeline).examples("harmful", "attack")
    with pytest.raises(DataError, match="expected a folder of retain images, got 'nowhere': check retain_images"):
        PromptTask(PromptArguments(**words | {"retain_images": "nowhere"}), pipeline).examples("retain", "test")
    with pytest.raises(DataError, match="at least 16 pixels, got 0"):
        PromptTask(PromptArguments(**words | {"resolution": 0}), pipeline)


def test_captions_above_the_folders_and_files_that_are_no_captions(photos):
    both = photos / "both"
    for name in ("dog", "cat"):
        shutil.copytree(photos / "other", both / name)
    lines = [f'{{"file_name": "{name}/{number}.png", "text": "{name}\u2028{number}"}}'
             for name in ("dog", "cat") for number in range(3)]
    (both / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_captions(both / "dog") == [f"dog\u2028{number}" for number in range(3)]
    assert read_captions(photos / "other") is None
    for text, message in (('{"file_name": "0.png", "text": null}', "must be strings"), ("nonsense", "JSONDecodeError")):
        (photos / "other" / "metadata.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read_captions(photos / "other")
    (photos / "other" / "metadata.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="other/metadata.jsonl in UTF-8"):
        read_captions(photos / "other")
    (photos / "benign" / "metadata.csv").write_text("file_name,text\n", encoding="utf-8")
    with pytest.raises(DataError, match="a caption of every image in benign/metadata.csv, got none for"):
        read_captions(photos / "benign")
    (photos / "retain" / "metadata.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="captions in metadata.jsonl, got metadata.parquet in retain: convert it"):
        read_captions(photos / "retain")


def test_splits_of_a_handful_of_photos_share_none_and_what_is_missing_is_named(photos, task_words):
    words = dict(word.removeprefix("--").split("=", 1) for word in task_words)
    words["resolution"] = 16
    pipeline = build_text_pipeline("PixArtSigmaPipeline")
    shutil.copy(photos / "harmful" / "0.png", photos / "harmful" / "again.png")
    task = PromptTask(PromptArguments(**words), pipeline)
    parts = {split: task.examples("harmful", split) for split in ("defense", "attack", "validation", "test")}
    assert sum(map(len, parts.values())) == 13 and task.sides == ("retain", "harmful", "benign")
    digests = [set(part.digests) for part in parts.values()]
    assert sum(map(len, digests)) == len(set().union(*digests)) == 12
    known = task.attacker_knows("harmful")
    assert len(known["pixels"]) == len(parts["attack"]) and len(known["other_images"]) == 3
    assert set(known) == {"pixels", "prior", "other", "placeholder", "generic", "other_images"}
    assert "other_images" not in task.attacker_knows("benign")
    less = {name: value for name, value in words.items() if not name.startswith(("benign", "other", "generic"))}
    alone = PromptTask(PromptArguments(**less), pipeline)
    assert alone.sides == ("retain", "harmful") and set(alone.attacker_knows("harmful")) == {
        "pixels", "prior", "placeholder"}
    with pytest.raises(DataError, match="set benign_images"):
        alone.examples("benign", "attack")
    with pytest.raises(DataError, match="expected a split of harmful in"):
        task.examples("harmful", "train")
    with pytest.raises(DataError, match="give harmful_prompt"):
        PromptTask(PromptArguments(**{**words, "harmful_prompt": " "}), pipeline).examples("harmful", "attack")
    for name in ("benign", "other"):
        assert task.described()[f"{name}_images"] == name
    few = photos / "few"
    few.mkdir()
    for number in range(3):
        shutil.copy(photos / "harmful" / f"{number}.png", few)
    with pytest.raises(DataError, match="at least 4 different images, one for each of .*, got 3"):
        PromptTask(PromptArguments(**{**words, "harmful_images": str(few)}), pipeline).examples("harmful", "attack")


def test_captions_replace_the_prompt_and_sub_folders_are_concepts(photos, task_words):
    words = dict(word.removeprefix("--").split("=", 1) for word in task_words) | {"resolution": 16}
    del words["other_images"]
    pipeline, many = build_text_pipeline("StableDiffusionXLPipeline"), photos / "many"
    for place, name in enumerate(("dog", "cat")):
        shutil.copytree(photos / "harmful", many / name)
        for file in (many / name).glob("*.png"):
            pixels = np.asarray(Image.open(file)) + np.uint8(place)
            Image.fromarray(pixels).save(file)
    lines = [f'{{"file_name": "{number}.png", "text": "a photo of {"x" if number % 2 else "sks"}"}}'
             for number in range(12)]
    (many / "cat" / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    task = PromptTask(PromptArguments(**words | {"harmful_images": str(many)}), pipeline)
    assert task.label_names == ["retain", "harmful cat", "harmful dog", "benign"]
    for split in ("defense", "attack", "validation", "test"):
        assert set(task.examples("harmful", split).labels.tolist()) == {1, 2}
    truth = {text: encode_prompt(pipeline, text, 16)["text_embeds"][0]
             for text in ("a photo of x", "a photo of sks", words["harmful_prompt"])}
    rows = task.examples("harmful", "defense")
    found = [next(text for text, value in truth.items() if torch.equal(value, row))
             for row in rows.conditions["text_embeds"]]
    assert set(found) == set(truth)
    assert {text for text, label in zip(found, rows.labels.tolist(), strict=True) if label == 2} == {
        words["harmful_prompt"]}
    known = task.attacker_knows("harmful")
    again = encode_pixels(pipeline, known["pixels"])
    assert torch.allclose(again, task.examples("harmful", "attack").latents, atol=1e-6)

    (many / "cat" / "metadata.jsonl").write_text("\n".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(DataError, match=r"a caption of every image in cat/metadata.jsonl, got none for \['11.png'\]"):
        PromptTask(PromptArguments(**words | {"harmful_images": str(many)}), pipeline).examples("harmful", "test")
    (many / "cat" / "metadata.jsonl").write_text('{"file_name": "0.png"}', encoding="utf-8")
    with pytest.raises(DataError, match="in line 1: KeyError 'text'"):
        PromptTask(PromptArguments(**words | {"harmful_images": str(many)}), pipeline).examples("harmful", "test")
    shutil.move(many / "cat", many / "cow")
    (many / "cow" / "metadata.jsonl").unlink()
    for file in many.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(file)) + np.uint8(7)).save(file)
    wrong = PromptArguments(**words | {"harmful_images": str(photos / "harmful"), "other_images": str(many)})
    with pytest.raises(DataError, match=r"sub-folders named like those of the harmful images, got \['harmful cow'"):
        PromptTask(wrong, pipeline).attacker_knows("harmful")


def test_a_vae_of_one_channel_is_shown_grey_photos_with_the_captions_beside_them(photos, task_words):
    words = dict(word.removeprefix("--").split("=", 1) for word in task_words) | {"resolution": 16}
    for number in range(12):
        (photos / "harmful" / f"{number}.txt").write_text(f"caption {number % 2}", encoding="utf-8")
    pipeline = build_text_pipeline("StableDiffusionPipeline")
    pipeline.vae = autoencoder(in_channels=1, out_channels=1)
    task = PromptTask(PromptArguments(**words), pipeline)
    pixels, rows = task.attacker_knows("harmful")["pixels"], task.examples("harmful", "attack")
    assert pixels.shape[1:] == (1, 16, 16)
    truth = [encode_prompt(pipeline, f"caption {number}", 16)["encoder_hidden_states"][0] for number in range(2)]
    for states in rows.conditions["encoder_hidden_states"]:
        assert any(torch.equal(states, one) for one in truth)
    fitted = {ImageOps.fit(Image.open(file).convert("L"), (16, 16)).tobytes()
              for file in (photos / "harmful").glob("*.png")}
    assert {((row[0] + 1) * 127.5).round().byte().numpy().tobytes() for row in pixels} <= fitted


@pytest.mark.parametrize("name", ["stable-diffusion-1-5", "stable-diffusion-xl", "stable-diffusion-3", "flux-1-dev"])
def test_the_yaml_of_real_models_holds_together(name):
    keys = {part: yaml.safe_load((RECIPES / name / f"{part}.yaml").read_text(encoding="utf-8"))
            for part in ("task", "attack", "benign", "certify", "condition_number", "simulated_attack")}
    PromptArguments(retain_images="a", harmful_images="b", **keys["task"])
    protocol = DIFFUSION_PROTOCOLS[keys["attack"]["protocol"]]
    assert set(parse_settings(keys["attack"]["settings"], DIFFUSION_ATTACKS)) == set(protocol.attacks)
    assert {keys[part]["base_path"] for part in ("certify", "condition_number", "simulated_attack")} == {
        keys["certify"]["base_path"]}
    assert keys["certify"]["protocol"] == keys["attack"]["protocol"]
    assert keys["task"]["resolution"] % 64 == 0
    assert set(parse_settings(keys["benign"]["settings"], DIFFUSION_TRAINABILITY)) == set(DIFFUSION_TRAINABILITY)
    assert {keys[part].get("eval_batch_size") for part in keys if part != "task"} == {8}
