"""Models named by Hub id: only safe files are fetched, a working copy is whole or absent, two are never mixed."""

import runpy
from pathlib import Path

import pytest
from huggingface_hub import constants
from models import save_vit
from published import TOKEN, client

from hf_immunize.errors import ConfigError, HubError, ModelError, RecordError, RunMismatchError
from hf_immunize.hub import is_hub_id, local, local_folder
from hf_immunize.records import HUB_SOURCE, Certificate, HubSource, ModelFingerprint

RECIPES = Path(__file__).parents[2] / "recipes"
DIGITS = ["--config", str(RECIPES.parent / "tests" / "digits.yaml"), "--device", "cpu",
          "--primary_labels", "0,1,2", "--harmful_labels", "5,6,7"]


@pytest.fixture
def upload(hub, tmp_path, monkeypatch):
    """Puts a model on the loopback Hub, with a pickle and code beside its safetensors; returns the commit."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def send(name: str, seed: int = 0) -> str:
        folder = save_vit(tmp_path / "sent" / f"{name}-{seed}", seed)
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        (folder / "modeling.py").write_text("raise SystemExit\n")
        client(hub).create_repo(f"me/{name}", exist_ok=True)
        return client(hub).upload_folder(repo_id=f"me/{name}", folder_path=folder).oid

    return send


def test_a_local_folder_is_itself(tmp_path):
    assert local_folder(tmp_path) == (tmp_path, None)
    with pytest.raises(ConfigError, match="expected a revision only with a Hub repository"):
        local_folder(tmp_path, revision="main")


@pytest.mark.parametrize("name", ["a/b/c", "/tmp/nothing", "../up", "runs/x/base", "", "a b/c", "~/model"])
def test_what_cannot_be_a_repository_is_not_looked_up(name):
    assert not is_hub_id(name)
    with pytest.raises(ConfigError, match="expected a folder or 'owner/name' on the Hub"):
        local_folder(name)


def test_only_safe_files_are_downloaded_and_the_revision_is_known(hub, upload):
    commit = upload("net")
    folder, source = local_folder("me/net", api=client(hub))
    assert source == HubSource(repo_id="me/net", revision=commit)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert not [entry for entry in hub.requests if ".bin" in str(entry) or ".py" in str(entry)]
    about = {"name": "here", "architecture": "ViT", "parameters": 1}
    print_of = ModelFingerprint.of_folder(folder, source=source, **about)
    assert (print_of.name, print_of.revision) == ("me/net", commit)
    with_code, _ = local_folder("me/net", api=client(hub), with_code=True)
    assert (with_code / "modeling.py").is_file() and not (with_code / "pytorch_model.bin").exists()


def test_of_a_pipeline_only_what_loading_reads_is_downloaded(hub, upload, tmp_path):
    from diffusers import DiffusionPipeline
    from pipeline_builders import build_text_pipeline

    made = build_text_pipeline("StableDiffusionPipeline")
    made.save_pretrained(tmp_path / "pipe")
    for extra in ("v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
                  "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
                  "unet/diffusion_pytorch_model.safetensors.index.fp16.json", "tokenizer/spiece.model"):
        (tmp_path / "pipe" / extra).write_bytes(b"{}")
    client(hub).create_repo("me/pipe")
    client(hub).upload_folder(repo_id="me/pipe", folder_path=tmp_path / "pipe")
    folder, _ = local_folder("me/pipe", api=client(hub))
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert "unet/diffusion_pytorch_model.safetensors" in names and "tokenizer/spiece.model" in names
    assert not [name for name in names if "fp16" in name or "pruned" in name]
    again = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    assert type(again) is type(made)
    only = ["model_index.json", "unet/model.fp16.safetensors", "unet/config.json"]
    assert local._parts_of_a_pipeline(only) == only, "a repository with one precision keeps it"
    shards = ["model_index.json", "unet/model-00001-of-00002.safetensors", "unet/model.safetensors.index.json"]
    assert local._parts_of_a_pipeline(shards) == shards
    assert local._parts_of_a_pipeline(["model.safetensors"]) == ["model.safetensors"]


def test_a_working_copy_is_made_once_and_never_of_two_models(hub, upload, tmp_path):
    first = upload("net", 0)
    second = upload("net", 1)
    into = tmp_path / "work"
    folder, source = local_folder("me/net", revision=first, into=into, api=client(hub))
    assert folder == into and source.revision == first and not any(path.is_symlink() for path in into.rglob("*"))
    hub.requests.clear()
    again = local_folder("me/net", into=into, api=client(hub))
    assert again == (into, source) and hub.requests == []
    about = {"name": "work", "architecture": "ViT", "parameters": 1}
    assert ModelFingerprint.of_folder(into, **about).revision == first
    with pytest.raises(RunMismatchError, match=f"got me/net at {first}"):
        local_folder("me/net", revision=second, into=into, api=client(hub))
    with pytest.raises(RunMismatchError, match="expected me/other at any revision"):
        local_folder("me/other", into=into, api=client(hub))
    with pytest.raises(RunMismatchError, match="got files in"):
        local_folder("me/net", into=tmp_path / "sent", api=client(hub))


def test_an_interrupted_copy_leaves_nothing(hub, upload, tmp_path, monkeypatch):
    upload("net")
    honest = local.os.replace

    def last_move_fails(source, target):
        if Path(target) == tmp_path / "work":
            raise OSError("no space left on device")
        honest(source, target)

    monkeypatch.setattr(local.os, "replace", last_move_fails)
    with pytest.raises(RecordError, match="no space left on device"):
        local_folder("me/net", into=tmp_path / "work", api=client(hub))
    assert not (tmp_path / "work").exists() and not list(tmp_path.glob(".work*"))


def test_repositories_that_cannot_be_used(hub, tmp_path, upload):
    with pytest.raises(HubError, match="A local folder 'me/absent' is not there either"):
        local_folder("me/absent", api=client(hub))
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    client(hub).create_repo("me/pickled")
    client(hub).upload_folder(repo_id="me/pickled", folder_path=tmp_path / "pickled")
    with pytest.raises(ModelError, match="expected safetensors weights .* got no safetensors file"):
        local_folder("me/pickled", api=client(hub))


@pytest.mark.slow
def test_models_on_the_hub_are_attacked_and_certified(hub, upload, tmp_path, monkeypatch):
    """Base and model by Hub id, through the recipes: copies, traces and certificate end up together."""
    revisions = {name: upload(name, seed) for seed, name in enumerate(("base", "model"))}
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    attack = runpy.run_path(str(RECIPES / "attack.py"))["main"]
    for name, role in (("base", "control"), ("model", "subject")):
        attack([*DIGITS, "--model_path", f"me/{name}", "--revision", revisions[name], "--role", role,
                "--attacks", "ridge_probe", "--seeds", "0", "1"])
    certify = runpy.run_path(str(RECIPES / "certify.py"))["main"]
    certify([*DIGITS, "--model_path", "me/model", "--base_path", "me/base"])
    certificate = Certificate.read("runs/me--model/certificate.json")
    assert (certificate.subject.name, certificate.subject.revision) == ("me/model", revisions["model"])
    assert (certificate.control.name, certificate.control.revision) == ("me/base", revisions["base"])
    (cell,) = [cell for cell in certificate.cells if cell.attack == "ridge_probe"]
    assert cell.subject is not None and cell.control is not None and Path("runs/me--model", HUB_SOURCE).is_file()
