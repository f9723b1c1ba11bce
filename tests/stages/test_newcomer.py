"""A newcomer's whole main job, from a folder of images and a model to a certificate and a report, in three commands.

All of it by the built wheel alone, in an environment outside the clone. Models are tiny and random, where no others lie
beside the repository: they exercise the way, and support no claim.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from installed import Installed, clean_install
from PIL import Image
from pipeline_builders import build_text_pipeline
from safetensors import safe_open
from sklearn.datasets import load_digits
from transformers import AutoModel, ViTImageProcessorPil
from vision_builders import build_classifier, image_size

from hf_immunize.hub import verify_folder
from hf_immunize.records import Certificate, ImmunizationRecord

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "hub"))
from zygote import Zygote  # noqa: E402

DATA = clean_install.found_data()
needs_data = pytest.mark.skipif(
    DATA is None, reason="needs weights and photos: HF_IMMUNIZE_DATA, or ../shared/data beside the repository")
START = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
SMALL = {
    "attack": {"seeds": [0, 1], "attacks": ["ridge_probe", "full_finetune"],
               "settings": ["full_finetune.steps=2", "full_finetune.learning_rate=1e-3", "ridge_probe.penalty=1"],
               "device": "cpu"},
    "immunize": {"max_steps": 2, "warmup_steps": 0, "per_device_train_batch_size": 8, "use_cpu": True,
                 "per_device_harmful_batch_size": 20, "report_to": "none"},
    "pretrain": {"max_steps": 2, "use_cpu": True, "report_to": "none"},
}  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """scikit-learn's handwritten digits as PNG files in one folder per class: 0-4, 5-7 and 8-9."""
    root, held = tmp_path_factory.mktemp("digits"), load_digits()
    sides = {"keep": range(5), "harm": range(5, 8), "harmless": range(8, 10)}
    for side, classes in sides.items():
        for label in classes:
            folder = root / side / f"digit {label}"
            folder.mkdir(parents=True)
            for number in np.flatnonzero(held.target == label)[:24]:
                pixels = np.round(held.images[number] * 255 / 16).astype(np.uint8)
                Image.fromarray(pixels).resize((16, 16)).save(folder / f"{number}.png")
    return root


class Forked(Installed):
    """The same commands as forks of one process of the environment, which has everything imported."""

    def start(self, folder):
        stages = [f"hf_immunize.stages.{name}" for name in ("immunize_classifier", "attack", "certify", "report",
                                                            "plan", "init", "run")]
        self.zygote = Zygote(self.environment(folder), *stages, python=str(self.python), forks=True)

    def call(self, folder, *words, expect=0):
        done = self.zygote.run(["hf-immunize", *map(str, words)], folder)
        assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


def as_printed(verb):
    """The words of a command as docs/start.md has it, after ``hf-immunize``."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", START, flags=re.S))
    (line,) = re.findall(rf"^hf-immunize ({verb} .+)$", blocks, flags=re.M)
    return line.split()


def save(folder, kind, names=None, headless=False):
    """A tiny model of one kind with its processor; with ``names`` its head knows the classes."""
    model = build_classifier(kind, labels=len(names or "abc"))
    if names:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: place for place, name in enumerate(names)}
    if headless:
        model = AutoModel.from_config(model.config)
    model.save_pretrained(folder)
    size = image_size(kind)
    ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)


def shrink(path, **more):
    """The run file with steps and attacks for a test; what init wrote is kept for the rest. ``more``: to immunize."""
    told = yaml.safe_load(path.read_text(encoding="utf-8"))
    told["attack"] |= SMALL["attack"]
    for options in told["immunize"].values():
        options.update(SMALL["immunize"] | more)
    if "pretrain" in told:
        told["pretrain"] |= SMALL["pretrain"]
    if "benign" in told:
        told["benign"] |= {"attacks": ["benign_probe"], "device": "cpu"}
    told["certify"]["device"] = "cpu"
    path.write_text(yaml.safe_dump(told, sort_keys=False), encoding="utf-8")
    return told


def whole_job(installed, work, digits, kind, *, names=None, headless=False, benign=False, **more):
    """init, plan, run, as docs/start.md has them; the model's folder."""
    save(work / "model", kind, names, headless)
    for name in ("keep", "harm"):
        (work / name).symlink_to(digits / name)
    told = installed.call(work, *as_printed("init"), *(["--benign", digits / "harmless"] if benign else []))
    assert "primary: 120 images of 5 classes" in told and "Next: hf-immunize plan job/run.yaml" in told
    written = (work / "job" / "run.yaml").read_text(encoding="utf-8")
    shown = shrink(work / "job" / "run.yaml", **more)
    assert ("pretrain" in shown) == (names is None) and ("benign" in shown) == benign
    model = plan_and_run(installed, work, {"primary images", "memory closed_form_adversary", "uplift", "disk", "time"})
    assert bool(Certificate.read(model / "certificate.json").trainability) == benign
    return model, written


def plan_and_run(installed, work, parts):
    """The second and third command, and what they leave: a certificate, a report, a folder that can be published."""
    plan = json.loads(installed.call(work, *as_printed("plan"), "--json"))
    assert not [line for line in plan if line["level"] == "fails" or "could not be looked at" in line["told"]], plan
    assert {"sides", "model", *parts} <= {line["part"] for line in plan}
    before = sorted(path.name for path in (work / "model").iterdir())
    installed.call(work, *as_printed("run"))
    assert sorted(path.name for path in (work / "model").iterdir()) == before, "the user's own model was touched"
    model = work / "job" / "closed_form_adversary"
    certificate = Certificate.read(model / "certificate.json")
    record = ImmunizationRecord.read(model / "immunization.json")
    assert certificate.subject.weights == record.model.weights and record.steps == SMALL["immunize"]["max_steps"]
    assert {cell.attack for cell in certificate.cells if cell.subject} == {"ridge_probe", "full_finetune"}
    assert (model.parent / "report.html").stat().st_size > 10_000 and (model / "README.md").is_file()
    assert verify_folder(model).sound
    assert "nothing was sent" in installed.call(work, *as_printed("publish"))
    return model


NAMES = [f"digit {label}" for label in range(5)]


def test_the_wheel_alone_leads_to_a_certificate_and_a_report(installed, tmp_path, digits):
    forked = Forked(installed.python)
    forked.start(tmp_path)
    try:
        whole_job(forked, tmp_path, digits, "vit", names=NAMES, trainable_modules="last:1", cache_frozen_features=True)
    finally:
        forked.zygote.close()


@pytest.mark.slow
def test_a_vision_transformer_that_knows_the_classes(installed, tmp_path, digits):
    model, written = whole_job(installed, tmp_path, digits, "vit", names=NAMES, benign=True)
    assert f"base: {tmp_path / 'model'}" in written and "CHECK" not in written
    told = installed.call(tmp_path, "run", "job/run.yaml")
    assert told.count("done before, unchanged") == 8 and "done in 0 s" in told
    assert "closed_form_adversary" in installed.call(tmp_path, *as_printed("show"))
    job, listed = tmp_path / "job", re.findall(r"^\| `([\w./]+)` \|", START, flags=re.M)
    assert len(listed) >= 7 and not [name for name in listed if not (job / name).exists()], listed
    with safe_open(model.parent / "base" / "model.safetensors", "pt") as copy:
        with safe_open(tmp_path / "model" / "model.safetensors", "pt") as own:
            assert sorted(copy.keys()) == sorted(own.keys())


@pytest.mark.slow
def test_a_convolutional_network_whose_head_knows_other_classes(installed, tmp_path, digits):
    _, written = whole_job(installed, tmp_path, digits, "resnet")
    assert "CHECK: the model's own head does not fit (3 outputs for 5 classes)" in written


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "headless"), [("convnext", False), ("swin", False), ("mobilenet_v2", False),
                                                ("dinov2", True)])
def test_other_backbones(installed, tmp_path, digits, kind, headless):
    _, written = whole_job(installed, tmp_path, digits, kind, headless=headless)
    assert ("The model has no head" in written) == headless


@needs_data
@pytest.mark.slow
def test_trained_weights_and_real_photos(installed, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / ".ci")
    import newcomer

    newcomer.prepare_photos(tmp_path, DATA)
    told = installed.call(tmp_path, *as_printed("init"))
    assert "MobileNetV2ForImageClassification" in told and "primary: 240 images of 6 classes" in told
    shrink(tmp_path / "job" / "run.yaml")
    plan_and_run(installed, tmp_path, {"primary images", "memory closed_form_adversary"})


def noise(folder):
    """Images that nobody has seen."""
    for place, (name, count) in enumerate({"keep": 10, "harm": 12, "harmless": 9}.items()):
        (folder / name).mkdir()
        for number in range(count):
            pixels = np.random.default_rng(100 * place + number).integers(0, 255, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def things(folder):
    """Real photos of six things, two on each side."""
    kinds_of = {"keep": ("vase", "teapot"), "harm": ("dog", "robot_toy"), "harmless": ("cat", "backpack")}
    for name, kinds in kinds_of.items():
        (folder / name).mkdir()
        for path in (path for kind in kinds for path in sorted((DATA / "dreambooth" / kind).iterdir())):
            shutil.copyfile(path, folder / name / f"{path.parent.name}-{path.name}")


@pytest.mark.slow
@pytest.mark.parametrize("photos", [noise, pytest.param(things, marks=needs_data)])
def test_a_diffusers_pipeline_and_folders_of_photos(installed, tmp_path, photos):
    build_text_pipeline("StableDiffusionPipeline").save_pretrained(tmp_path / "model")
    photos(tmp_path)
    told = installed.call(tmp_path, "init", "job", "--model", "model", "--primary", "keep", "--harmful", "harm",
                "--benign", "harmless", "--harmful_prompt", "a photo of sks dog")
    assert "made from prompts" in told and "2 lines marked CHECK" in told
    path = tmp_path / "job" / "run.yaml"
    run = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert run["task"]["harmful_prompt"] == "a photo of sks dog" and run["task"]["resolution"] % 16 == 0
    run["task"]["resolution"] = 16
    run["immunize"]["simulated_attack"] |= {"max_steps": 1, "attacker_steps": 1, "use_cpu": True, "eval_steps": 1,
                                            "gradient_accumulation_steps": 1, "max_primary_drop": 1e6,
                                            "gradient_checkpointing": False}
    small = {"steps": 2, "learning_rate": "1e-3", "batch_size": 3}
    tried = {"attack": "diffusion_full_finetune", "benign": "benign_diffusion_full_finetune"}
    for section, name in tried.items():
        run[section] |= {"attacks": [name], "settings": [f"{name}.{key}={value}" for key, value in small.items()],
                         "seeds": [0, 1], "trials": 0, "tuning_seeds": 0, "exam_levels": 2, "pictures": 0,
                         "device": "cpu"}
    run["certify"] |= {"judged_images": 4, "draw_steps": 2, "device": "cpu"}
    path.write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
    plan = json.loads(installed.call(tmp_path, "plan", "job/run.yaml", "--json"))
    assert {"retain photos", "harmful photos", "benign photos", "memory simulated_attack"} <= {
        line["part"] for line in plan} and not [line for line in plan if line["level"] == "fails"], plan
    installed.call(tmp_path, *as_printed("run"))
    model = tmp_path / "job" / "simulated_attack"
    certificate = Certificate.read(model / "certificate.json")
    assert certificate.trainability and [cell for cell in certificate.cells if cell.subject is not None]
    assert (model.parent / "report.html").is_file() and verify_folder(model).sound
    publish = [word.replace("closed_form_adversary", model.name) for word in as_printed("publish")]
    assert "nothing was sent" in installed.call(tmp_path, *publish)


@pytest.mark.slow
def test_what_init_refuses(tmp_path, digits):
    save(tmp_path / "model", "vit", NAMES)
    keep, harm = str(digits / "keep"), str(digits / "harm")
    refused = {
        "expected other classes as harmful than as primary": ["job", "--model=model", f"--primary={keep}",
                                                              f"--harmful={keep}"],
        "expected a folder first, as in hf-immunize init DIR": ["--model=m"],
        "expected other classes as benign than as harmful": ["job", "--model=model", f"--primary={keep}",
                                                             f"--harmful={harm}", f"--benign={harm}"],
        "expected no primary_prompt for an image classifier": ["job", "--model=model", f"--primary={keep}",
                                                               f"--harmful={harm}", "--primary_prompt=x"],
        "expected an image processor in nowhere": ["job", "--model=nowhere", f"--primary={keep}", f"--harmful={harm}"],
        "there is no such file or folder": ["job", "--model=model", "--primary=no/where/at", f"--harmful={harm}"],
    }
    code = (f"from hf_immunize.cli import app\nfor words in {list(refused.values())}:\n"
            "    try:\n        app(['init', *words])\n    except SystemExit as left:\n        print(left.code)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["1"] * len(refused) and "Traceback" not in done.stderr, done.stderr
    for told in refused:
        assert told in done.stderr, (told, done.stderr)
    assert not (tmp_path / "job").exists()


@pytest.mark.slow
def test_what_plan_finds(installed, tmp_path, digits):
    """A corrupt image, an image on both sides, a class of two images, a typing error: all in one look."""
    for source in (*(digits / "keep").iterdir(), *(digits / "harm").iterdir()):
        folder = tmp_path / source.parent.name / source.name
        folder.mkdir(parents=True)
        for file in sorted(source.iterdir())[: 24 if source.name != "digit 6" else 2]:
            (folder / file.name).write_bytes(file.read_bytes())
    first = sorted((tmp_path / "keep" / "digit 1").iterdir())
    first[0].write_bytes(b"")
    first[1].write_bytes(first[1].read_bytes()[:-30])
    (tmp_path / "harm" / "digit 5" / "copy.png").write_bytes(first[2].read_bytes())
    (tmp_path / "keep" / "notes.docx").write_text("mine")
    save(tmp_path / "model", "vit", NAMES)
    text = ("task: {primary_dataset: keep, harmful_dataset: harm}\nbase: model\n"
            "immunize: {one: {objective: ill_only, strenght: 2}}\nattack: {attacks: [lorra]}\n")
    (tmp_path / "run.yaml").write_text(text)
    plan = json.loads(installed.call(tmp_path, "plan", "run.yaml", "--json", expect=1))
    told = {line["told"]: line["level"] for line in plan}
    for wanted, level in ((r"unknown ['strenght']: see --help. Did you mean strength?", "fails"),
                          ("expected an attack in", "fails"), (f"{first[0].name} (an empty file)", "fails"),
                          (first[1].name, "fails"), ("1 equal files on both sides", "note"),
                          ("left out 1 .docx", "note"), ("got fewer in ['digit 6']", "fails")):
        assert [line for line in told if wanted in line and told[line] == level], (wanted, plan)
    shown = installed.call(tmp_path, "plan", "run.yaml", expect=1)
    assert "found what would stop the run" in shown
