"""Publish, download, verify, load: the real client, real model classes, random weights."""

import json
import shutil
import subprocess
import sys

import models
import pytest
import torch
from equality import depth, same_bits, units_apart
from huggingface_hub import ModelCard
from published import asking, client
from transformers import AutoModelForImageClassification, ViTForImageClassification

from hf_immunize.errors import ConfigError, ModelError, VerificationError
from hf_immunize.hub import load_verified, publish, verify_folder
from hf_immunize.records import Certificate


def same(first, second):
    return same_bits(first.state_dict(), second.state_dict())


@pytest.mark.parametrize("saving", [{}, {"max_shard_size": "4KB"}], ids=["one file", "shards"])
def test_vision(hub, tmp_path, saving):
    folder = models.certified_vit(tmp_path, **saving)
    assert len(list(folder.glob("*.safetensors"))) == (1 if not saving else 3)
    publish(folder, "me/model", api=client(hub))
    snapshot = client(hub).snapshot_download("me/model", cache_dir=tmp_path / "cache")
    assert verify_folder(snapshot, policy=asking(overall="RESISTS")).ok
    by_hand = AutoModelForImageClassification.from_pretrained(snapshot, use_safetensors=True)
    loaded = load_verified("me/model", api=client(hub), cache_dir=tmp_path / "cache2", policy=asking(overall="RESISTS"))
    assert same(by_hand, loaded) and same(loaded, ViTForImageClassification.from_pretrained(folder))
    base = ViTForImageClassification.from_pretrained(tmp_path / "base")
    assert not same(loaded, base)


KINDS = {
    "transformers": models.certified_vit,
    "peft": lambda root: models.certified_adapter(root)[0],
    "diffusers": models.certified_pipeline,
}


@pytest.mark.parametrize("library", KINDS)
def test_the_metadata_parses_back_to_the_numbers_of_the_certificate(hub, tmp_path, library):
    pytest.importorskip(library, reason=f"the package {library} is not installed")
    folder = KINDS[library](tmp_path)
    publish(folder, "me/model", api=client(hub))
    assert "validate" in hub.requests, "the card was not put before the Hub's own validation"
    path = client(hub).hf_hub_download("me/model", "README.md", cache_dir=tmp_path / "cache")
    card = ModelCard.load(path)
    assert card.data.library_name == library
    results = {result.metric_name: result for result in card.data.eval_results}
    certificate = Certificate.read(folder / "certificate.json")
    assert results["Primary metric, percent"].metric_value == certificate.utility.immunized
    cells = {cell.attack: cell for cell in certificate.cells}
    assert results["Slow-down under linear_probe_adam"].metric_value == cells["linear_probe_adam"].slow_down.estimate
    for attack, cell in cells.items():
        mean = sum(cell.subject.accuracy) / len(cell.subject.accuracy)
        assert results[f"Harmful accuracy after {attack}, percent"].metric_value == pytest.approx(100 * mean, rel=1e-12)


def test_a_backbone_without_head(hub, tmp_path):
    folder = models.certified_backbone(tmp_path)
    publish(folder, "me/backbone", api=client(hub))
    loaded = load_verified("me/backbone", api=client(hub), cache_dir=tmp_path / "cache")
    assert type(loaded).__name__ == "ViTModel" and same(loaded, type(loaded).from_pretrained(folder))


def test_a_backbone_with_our_head_loads_where_only_the_hub_room_was_imported(hub, tmp_path):
    folder = models.certified_headed_backbone(tmp_path)
    publish(folder, "me/headed", api=client(hub))
    assert type(load_verified("me/headed", api=client(hub), cache_dir=tmp_path / "cache")).__name__ == (
        "BackboneForImageClassification"
    )
    script = f"from hf_immunize.hub import load_verified; print(type(load_verified({str(folder)!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "BackboneForImageClassification" in done.stdout, done.stderr


def test_an_adapter_on_its_own_base_only(hub, tmp_path):
    folder, base = models.certified_adapter(tmp_path)
    publish(folder, "me/adapter", api=client(hub))
    options = {"api": client(hub), "cache_dir": tmp_path / "cache"}
    with pytest.raises(ModelError, match="expected the folder of the base 'base' for this adapter"):
        load_verified("me/adapter", **options)
    other = models.save_vit(tmp_path / "other", seed=9)
    with pytest.raises(VerificationError, match="an adapter on another base is another model"):
        load_verified("me/adapter", base=other, **options)
    loaded = load_verified("me/adapter", base=base, **options)
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    from peft import PeftModel

    by_hand = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(base), folder)
    assert same(loaded, by_hand)
    plain = ViTForImageClassification.from_pretrained(base).eval()
    with torch.no_grad():
        logits = loaded.eval()(pixel_values=pixels).logits
        assert units_apart(logits, by_hand.eval()(pixel_values=pixels).logits) <= depth(by_hand)
        assert not torch.allclose(logits, plain(pixel_values=pixels).logits)


def test_a_diffusion_pipeline(hub, tmp_path):
    pytest.importorskip("diffusers", reason="the diffusers extra is not installed")
    folder = models.certified_pipeline(tmp_path)
    publish(folder, "me/pipeline", api=client(hub))
    loaded = load_verified("me/pipeline", api=client(hub), cache_dir=tmp_path / "cache")
    assert same(loaded.unet, type(loaded.unet).from_pretrained(folder / "unet"))
    shutil.copy(tmp_path / "base/unet/diffusion_pytorch_model.safetensors", folder / "unet")
    with pytest.raises(VerificationError, match="unet/diffusion_pytorch_model.safetensors: these are the weights of"):
        load_verified(folder)


def test_nothing_is_loaded_that_does_not_verify(tmp_path, monkeypatch):
    folder = models.certified_vit(tmp_path)
    monkeypatch.setattr(AutoModelForImageClassification, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(VerificationError, match="an unmet policy"):
        load_verified(folder, policy=asking(families={"LoRA": "RESISTS"}))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(VerificationError, match="pytorch_model.bin: a pickle"):
        load_verified(folder)


def test_options_that_could_load_something_else_are_refused(tmp_path):
    folder = models.certified_vit(tmp_path)
    for option in ("subfolder", "variant", "use_safetensors", "state_dict", "config"):
        with pytest.raises(ConfigError, match=f"got \\['{option}'\\]"):
            load_verified(folder, **{option: None})
    assert load_verified(folder, dtype=torch.float16).dtype == torch.float16


def test_remote_code_is_off_unless_asked(tmp_path, monkeypatch):
    folder = models.certified_vit(tmp_path)
    seen = []
    monkeypatch.setattr(AutoModelForImageClassification, "from_pretrained", lambda *_, **given: seen.append(given))
    load_verified(folder)
    load_verified(folder, trust_remote_code=True)
    assert [given["trust_remote_code"] for given in seen] == [False, True]
    assert all(given["use_safetensors"] and given["local_files_only"] for given in seen)


def test_a_configuration_that_leads_to_another_repository_loads_nothing_from_there(tmp_path):
    folder = models.certified_vit(tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    with pytest.raises(VerificationError, match="the exam did not load this file, but a user would"):
        load_verified(folder)
