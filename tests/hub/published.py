"""A tiny certified model on disk, and a client that talks to the loopback Hub. Random weights exercise code only."""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import replace
from pathlib import Path

import record_builders as build
from huggingface_hub import HfApi

from hf_immunize.records import AttackTrace, Certificate, sha256_file

TODAY = datetime.date.today()
TOKEN = "hf_" + "LoopbackSecretToken" + "0123456789abcd"
CREATED = (TODAY - datetime.timedelta(days=10)).isoformat()
EXPIRES = (TODAY + datetime.timedelta(days=100)).isoformat()
RESISTING = tuple(attack for attack in build.ATTACKS if attack.verdict == "RESISTS")


SMALL_EXAM = {"exam": None, "min_seeds": 1, "trainable": False, "rejudged": False}
"""What a policy does not ask of the synthetic exam of these tests: three seeds of two invented attacks."""


def asking(**more):
    """A policy on such an exam."""
    from hf_immunize.hub.policy import Policy

    return Policy(**(SMALL_EXAM | {"overall": "FAILS", "max_primary_drop": None} | more))


def provenance(created: str = CREATED):
    return build.PROVENANCE.model_copy(update={"created": f"{created}T00:00:00+00:00"})


def config_of_vit() -> dict:
    return {
        "architectures": ["ViTForImageClassification"], "model_type": "vit", "image_size": 8, "patch_size": 4,
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "num_channels": 3, "id2label": {"0": "zero", "1": "one"}, "label2id": {"zero": 0, "one": 1},
    }


def certified(root: Path, name: str = "condition_number", attacks=RESISTING, **extra) -> Path:
    """A folder as certification leaves it: fake weights, traces, certificate, configuration."""
    fields = {"provenance": provenance(), "expires": EXPIRES} | extra
    folder = build.exam_folder(root, build.Exam(name=name, attacks=attacks, extra=fields))
    (folder / "config.json").write_text(json.dumps(config_of_vit()))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    (folder / "run.json").write_text("{}")
    return folder


def release_grade(root: Path, name: str = "release", *, normalised: bool = True, verdicts=None, **extra) -> Path:
    """A synthetic folder with every attack of the standard exam on five seeds, and benign trainability.

    Args:
        normalised: whether the weights have statistics of batch normalisation; else that attack does not apply.
        verdicts: verdict by attack, where it is not RESISTS.
    """
    import torch
    from safetensors.torch import save_file

    from hf_immunize.exam import PROTOCOLS

    def attack(named):
        verdict = (verdicts or {}).get(named) or (
            "RESISTS" if normalised or named != "batchnorm_probe" else "NOT APPLICABLE")
        ran = verdict not in ("NOT RUN", "NOT APPLICABLE")
        return build.Attack(named, f"family of {named}", verdict, 9.0, budget=20, base_steps=2, ran=ran)

    attacks = [attack(named) for named in PROTOCOLS["standard"].attacks]
    learned = [item.model_copy(update={"verdict": "EQUIVALENT"}) for item in build.trainability()]
    folder = build.exam_folder(root, build.Exam(name=name, attacks=attacks, seeds=range(5), extra={
        "provenance": provenance(), "expires": EXPIRES, "trainability": learned, "protocol": "standard"}))
    tensors = {"weight": torch.ones(2)} | ({"norm.running_mean": torch.zeros(2)} if normalised else {})
    (folder / "config.json").write_text(json.dumps(config_of_vit()))
    save_file(tensors, folder / "model.safetensors")
    certificate = Certificate.read(folder / "certificate.json")
    subject = build.fingerprint(folder, name)
    for path in folder.glob("traces/subject/*.json"):
        AttackTrace.read(path).model_copy(update={"model": subject}).write(path)
    traces = {name: sha256_file(folder / name) for name in certificate.traces}
    certificate.model_copy(update={"subject": subject, "traces": traces} | extra).write(folder / "certificate.json")
    return folder


def failing(root: Path, **extra) -> Path:
    """A model that two attackers break."""
    attacks = [replace(attack) for attack in build.ATTACKS if attack.ran]
    return certified(root, "failing", attacks, **extra)


def client(hub, token: str = TOKEN) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def write_release(folder: Path, target: Path, **options) -> Path:
    """What a download of the published folder would hold, without a network."""
    from hf_immunize.hub.policy import Policy
    from hf_immunize.hub.release import prepare

    options.setdefault("policy", Policy(**SMALL_EXAM))
    release = prepare(folder, repo_id="me/model", **options)
    contents = dict(release.small) | {name: path.read_bytes() for name, path in release.weights.items()}
    for name, data in contents.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
    return target


def reseal(folder: Path, key: Path | None = None) -> None:
    """What an attacker without the publisher's key can do: make the seal fit again, without a signature or by another
    key."""
    from hf_immunize.hub.levels import Trust, speakers_line
    from hf_immunize.hub.seal import write_seal
    from hf_immunize.hub.signature import public_key_of, sign

    (folder / "certificate.sig").unlink(missing_ok=True)
    card = folder / "README.md"
    if card.is_file():
        said = speakers_line([] if key is None else [Trust("signed", public_key_of(key))])
        card.write_text(re.sub(r"(\*\*Who says so:\*\*) .*", lambda match: f"{match[1]} {said}", card.read_text()))
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    digests = {name: sha256_file(path) for name, path in files.items()}
    if key is not None:
        (folder / "certificate.sig").write_bytes(
            sign((folder / "certificate.json").read_bytes(), write_seal(digests), key))
        digests["certificate.sig"] = sha256_file(folder / "certificate.sig")
    (folder / "SHA256SUMS").write_bytes(write_seal(digests))


def publish_in_child(folder: str, url: str) -> None:
    """Runs in a process of its own, which a test may kill."""
    from huggingface_hub import HfApi, constants

    from hf_immunize.hub import publish

    constants.HF_HUB_DISABLE_XET = True
    from hf_immunize.hub.policy import Policy

    publish(folder, "me/model", policy=Policy(**SMALL_EXAM), api=HfApi(endpoint=url, token=TOKEN))
