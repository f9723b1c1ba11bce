"""The Trainer's own pushes, through the gate, to the loopback Hub."""

import importlib
from pathlib import Path

import models
import pytest
import torch
from huggingface_hub import HfApi
from published import TOKEN, client

from hf_immunize.errors import PublishRefusedError, RecordError
from hf_immunize.hub import verify_model
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer


@pytest.fixture
def trainer(tmp_path, make_vit, make_pixels):
    settings = ImmunizationConfig(
        output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=8, per_device_harmful_batch_size=12,
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, push_to_hub=True,
        hub_model_id="me/model", hub_token=TOKEN, hub_private_repo=True,
    )
    return ImmunizationTrainer(model=make_vit(), args=settings, train_dataset=make_pixels(24),
                               harmful_dataset=make_pixels(30, seed=1))


def test_what_a_trainer_pushes_has_passed_the_gate(hub, tmp_path, trainer, monkeypatch):
    room = importlib.import_module("hf_immunize.hub.publishing")
    monkeypatch.setattr(room, "HfApi", lambda token=None: HfApi(endpoint=hub.url, token=token))
    trainer.train()
    trainer.save_model()
    assert hub.requests == [], "weights went out before their exam"
    folder = Path(trainer.args.output_dir)
    base = models.save_vit(tmp_path / "base", seed=0)
    models.certify(folder, base, "trained", "ViTForImageClassification")
    done = trainer.push_to_hub(commit_message="Certified")
    assert done.confirmed and hub.head("me/model").title == "Certified" and hub.repositories["me/model"].private
    assert TOKEN in hub.tokens
    _, found = verify_model("me/model", api=client(hub), cache_dir=tmp_path / "cache")
    assert found.ok and "report.html" in found.digests
    commits = hub.requests.count("commit")
    trainer.save_model()  # push_to_hub=True: the same weights go through the gate again, and nothing changes
    assert hub.requests.count("commit") == commits and hub.head("me/model").oid == done.revision
    with pytest.raises(RecordError, match="Make a new trainer with the base"):
        trainer.train()
    with torch.no_grad():
        next(trainer.model.parameters()).add_(0.1)
    trainer.save_model()
    with pytest.raises(PublishRefusedError, match=r"model\.safetensors: not the weights that were examined"):
        trainer.push_to_hub()
    assert hub.requests.count("commit") == commits and hub.head("me/model").oid == done.revision
