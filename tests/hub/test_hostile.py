"""Tricks of a publisher or of somebody in between: each is refused, and says why."""

import hashlib
import json
import os
import shutil

import models
import pytest
from published import TODAY, asking, certified, client, failing, provenance, reseal, write_release
from test_verify import build_with_files, failures, message

from hf_immunize.errors import ConfigError, PublishRefusedError, RecordError, VerificationError
from hf_immunize.hub import Policy, load_verified, publish, verify_folder, verify_model
from hf_immunize.hub.demands import code_in, custom_components, elsewhere_in
from hf_immunize.hub.inventory import LARGEST_TEXT
from hf_immunize.hub.signature import make_key
from hf_immunize.records import Certificate


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A signed, published folder and its publisher's key."""
    root = tmp_path_factory.mktemp("hostile")
    folder = build_with_files(certified(root))
    public = make_key(root / "key.pem")
    return write_release(folder, root / "published", signing_key=root / "key.pem"), public


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "model")


# ---- what the publisher's signature covers


@pytest.mark.parametrize("name", ["report.html", "immunization.json", "plots/01-linear-probe-gd.svg"])
def test_a_changed_page_record_or_picture_under_a_new_seal_is_not_what_was_signed(made, folder, name):
    """The seal alone is no signature: whoever can change files can seal them again."""
    signature = (folder / "certificate.sig").read_bytes()
    text = (folder / name).read_text(encoding="utf-8")
    (folder / name).write_text(text.replace("400", "401").replace("</", " </"), encoding="utf-8")
    assert (folder / name).read_text(encoding="utf-8") != text
    reseal(folder)
    (folder / "certificate.sig").write_bytes(signature)
    sealed = (folder / "SHA256SUMS").read_text()
    (folder / "SHA256SUMS").write_text(sealed + f"{hashlib.sha256(signature).hexdigest()}  certificate.sig\n")
    found = verify_folder(folder, trusted_key=made[1])
    assert ("signature-seal", "SHA256SUMS") in failures(found) and found.signed_by is None
    (folder / "SHA256SUMS").unlink()
    assert not verify_folder(folder, trusted_key=made[1]).sound, "a signed release without its seal"


def test_an_old_signature_over_other_files_is_not_published(tmp_path):
    folder = certified(tmp_path)
    make_key(tmp_path / "key.pem")
    write_release(folder, tmp_path / "out", signing_key=tmp_path / "key.pem")
    shutil.copy(tmp_path / "out/certificate.sig", folder)
    write_release(folder, tmp_path / "again")  # nothing has changed since: it still signs these files
    (folder / "LICENSE").write_text("another")
    with pytest.raises(PublishRefusedError, match=r"expected certificate\.sig to sign the files that go out now"):
        write_release(folder, tmp_path / "third")


# ---- what a configuration can ask of the loader


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"attn_implementation": "somebody/kernel"}, "whose code is fetched from the Hub"),
        ({"_attn_implementation": {"": "somebody/kernel"}}, "whose code is fetched from the Hub"),
        ({"vision_config": {"experts_implementation": "somebody/kernel@v1"}}, "whose code is fetched from the Hub"),
        ({"transformers_weights": "adapter_model.bin"}, "no safetensors file of this folder"),
        ({"transformers_weights": "../other/model.safetensors"}, "no safetensors file of this folder"),
    ],
)
def test_a_configuration_that_leads_elsewhere(tmp_path, config, told):
    folder = certified(tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"} | config))
    build_with_files(folder)
    assert told in message(verify_folder(folder), "elsewhere")
    with pytest.raises(PublishRefusedError, match="it makes the loader go elsewhere"):
        publish(folder, "me/model", dry_run=True, allow_failed=True)


def test_what_a_configuration_may_say():
    assert elsewhere_in(b'{"attn_implementation": "sdpa", "transformers_weights": "model.safetensors"}') == []
    (found,) = elsewhere_in(b'{"configuration_files": ["config.5.0.0.json"]}')
    assert "in the place of config.json" in found
    assert elsewhere_in(b"\xff") == elsewhere_in(b"[" * 100_000) == elsewhere_in(b"[1]") == []
    assert code_in("config.json", b'{"auto_map": {}}') == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("preprocessor_config.json", {"image_processor": {"auto_map": {"AutoImageProcessor": "evil.Mine"}}}),
        ("model_index.json", {"_class_name": ["pipeline", "Mine"]}),
        ("model_index.json", {"_class_name": "DDPMPipeline", "unet": ["my_unet", "MyUNet"]}),
    ],
)
def test_code_of_the_repository_is_not_published_wherever_it_is_named(tmp_path, name, content):
    folder = certified(tmp_path)
    (folder / name).write_text(json.dumps(content))
    (folder / "unet").mkdir()
    (folder / "unet/my_unet.py").write_text("print('hello')")
    with pytest.raises(PublishRefusedError, match="expected a model that loads without remote code"):
        publish(folder, "me/model", dry_run=True, allow_failed=True)


def test_components_of_libraries_are_no_custom_code():
    index = json.dumps({"unet": ["diffusers", "UNet2DModel"], "safety": ["mine", "X"], "none": [None, None], "x": 1})
    assert custom_components(index.encode(), {"unet/config.json": 0}) == []
    assert custom_components(index.encode(), {"safety/mine.py": 0}) == ["safety/mine.py"]


# ---- the card


@pytest.mark.parametrize("forged", [
    "```\n", "~~~\n", "![verdicts](https://evil.example/green.png)\n", "$$\n", "\\[\n", "[x]: https://evil.example\n",
])
def test_what_would_hide_the_tables_or_show_others(folder, forged):
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("## Verdicts", f"{forged}\n## Verdicts"))
    assert "tables and quotes" in message(verify_folder(folder), "card")


def test_a_picture_that_was_taken_out_of_the_card_or_leads_elsewhere(folder):
    card = (folder / "README.md").read_text()
    for change in ("", "![Attack x](https://evil.example/x.svg)"):
        line = next(line for line in card.splitlines() if line.startswith("!["))
        (folder / "README.md").write_text(card.replace(line, change))
        assert "tables and quotes" in message(verify_folder(folder), "card")


def test_metadata_and_policies_with_a_key_twice(folder, tmp_path):
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("---\n", "---\nlicense: mit\nlicense: other\n", 1))
    assert "the same key twice" in message(verify_folder(folder), "card")
    (tmp_path / "policy.yaml").write_text("overall: RESISTS\noverall: FAILS\n")
    with pytest.raises(ConfigError, match="the same key twice"):
        Policy.read(tmp_path / "policy.yaml")


# ---- sizes, names, races


@pytest.mark.parametrize("name", ["certificate.json", "certificate.sig", "SHA256SUMS", "README.md"])
def test_records_too_large_to_be_any(folder, name):
    with open(folder / name, "r+b") as stream:
        stream.truncate(LARGEST_TEXT + 1)
    assert name in {file for _, file in failures(verify_folder(folder))}


@pytest.mark.parametrize("name", ["immunization.json", "config.json", "README.md"])
def test_a_file_that_is_none_is_not_waited_for_nor_read_when_the_card_is_compared(folder, tmp_path, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert ("special", name) in failures(verify_folder(folder))
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert ("link", name) in failures(verify_folder(folder))


def test_an_immunization_record_too_large_to_be_one(folder):
    with open(folder / "immunization.json", "r+b") as stream:
        stream.truncate(LARGEST_TEXT + 1)
    assert "below 16 MiB" in message(verify_folder(folder), "card")


def test_a_folder_that_becomes_a_link_while_it_is_read(folder, tmp_path, monkeypatch):
    """Between listing and opening: the link is not followed."""
    from hf_immunize.hub import verify as room

    real = room.scan

    def listing(*given):
        inventory = real(*given)
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to(tmp_path / "secret.json")
        return inventory

    (tmp_path / "secret.json").write_text('{"secret": 1}')
    monkeypatch.setattr(room, "scan", listing)
    with pytest.raises(RecordError, match="expected to read config.json"):
        verify_folder(folder)


@pytest.mark.parametrize("name", ["Config.json", "TRACES/x.json", "Plots/x.png", "co\u0301nfig.json", "ｃonfig.json"])
def test_names_that_some_systems_take_for_others(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert "name" in {code for code, _ in failures(verify_folder(folder))}


def test_an_index_of_pickled_shards_is_a_pickle(folder):
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    assert ("pickle", "pytorch_model.bin.index.json") in failures(verify_folder(folder))


# ---- adapters and pipelines


def test_the_base_of_an_adapter_may_come_from_the_cache_and_brings_nothing_with_it(hub, tmp_path):
    folder, base = models.certified_adapter(tmp_path)
    hub.put_revision("me/base", {path.name: path.read_bytes() for path in base.iterdir()})
    snapshot = client(hub).snapshot_download("me/base", cache_dir=tmp_path / "cache")
    assert load_verified(folder, base=snapshot) is not None
    for name, content, told in (
        ("adapter_config.json", "{}", "an adapter of its own"), ("pytorch_model.bin", "x", "a pickle"),
        ("config.json", '{"attn_implementation": "a/b"}', "go elsewhere"),
    ):
        changed = shutil.copytree(base, tmp_path / told.replace(" ", "_"))
        (changed / name).write_text(content)
        with pytest.raises(VerificationError, match=told):
            load_verified(folder, base=changed)


def test_a_pipeline_with_a_component_more_or_less_than_certified(tmp_path):
    pytest.importorskip("diffusers", reason="the diffusers extra is not installed")
    folder = models.certified_pipeline(tmp_path)
    extra = shutil.copytree(folder, tmp_path / "extra")
    shutil.copytree(extra / "unet", extra / "vae")
    assert ("weights-extra", "vae/diffusion_pytorch_model.safetensors") in failures(verify_folder(extra))
    shutil.rmtree(folder / "unet")
    assert ("weights-missing", "unet/diffusion_pytorch_model.safetensors") in failures(verify_folder(folder))


def test_publishing_again_what_was_downloaded(hub, tmp_path):
    """The cache's snapshots are links; what they hold may go out again, under another name."""
    publish(build_with_files(certified(tmp_path)), "me/model", api=client(hub))
    snapshot, _ = verify_model("me/model", api=client(hub), cache_dir=tmp_path / "cache")
    assert publish(snapshot, "me/fork", api=client(hub)).confirmed
    mine, theirs = (hub.head(name).files for name in ("me/model", "me/fork"))
    assert {name for name in mine if mine[name] != theirs[name]} == {"README.md"}


# ---- the gate


def test_a_policy_for_a_whole_preset(tmp_path):
    folder = failing(tmp_path)
    policy = asking(exam="quick")
    assert "not run: standardized_probe_adam" in message(verify_folder(folder, policy=policy), "policy")
    cells = Certificate.read(folder / "certificate.json").cells
    from hf_immunize.exam import PROTOCOLS

    sat = [cells[0].model_copy(update={"attack": attack}) for attack in PROTOCOLS["quick"].attacks]
    certificate = Certificate.read(folder / "certificate.json")
    family = certificate.families[0].model_copy(update={"attacks": [cell.attack for cell in sat]})
    certificate = certificate.model_copy(update={
        "cells": sat, "traces": {}, "planned": [cell.attack for cell in sat], "families": [family]})
    certificate.write(folder / "certificate.json")
    assert "policy" not in {item.code for item in verify_folder(folder, policy=policy).findings}
    with pytest.raises(ConfigError, match="expected a protocol in"):
        verify_folder(folder, policy=asking(exam="none"))


def test_a_report_of_another_exam_is_never_published(tmp_path):
    """The page in the folder may be of any models; the one that goes out is drawn from this certificate."""
    folder = certified(tmp_path)
    (folder / "report.html").write_text("<h1>RESISTS everything</h1>")
    (folder / "plots").mkdir()
    (folder / "plots/09-of-an-older-exam.svg").write_text("<svg/>")
    out = write_release(folder, tmp_path / "out")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "RESISTS everything" not in page and "condition_number" in page
    assert sorted(path.name for path in (out / "plots").iterdir()) == [
        "01-linear-probe-gd.svg", "02-linear-probe-adam.svg"]


def test_dates_of_a_certificate_cannot_outlive_its_rule(tmp_path):
    folder = certified(tmp_path, provenance=provenance((TODAY).isoformat()), expires="9999-12-31")
    assert "longer than" in message(verify_folder(folder), "expiry")
