
import pytest
from huggingface_hub import ModelCard
from loopback import git_digest
from published import TOKEN, asking, certified, client, failing

from hf_immunize.errors import (
    ConfigError,
    HubError,
    PolicyUnmetError,
    PublishRefusedError,
    RecordError,
    VerificationError,
)
from hf_immunize.hub import CardOptions, publish, verify_model
from hf_immunize.hub.signature import make_key
from hf_immunize.records import Certificate


def test_everything_goes_in_one_commit(hub, tmp_path):
    folder = certified(tmp_path)
    (folder / "report.html").write_text("<p>report</p>")
    (folder / "curve.png").write_bytes(b"\x89PNG")
    (folder / "LICENSE").write_text("licence")
    (folder / "training_args.bin").write_bytes(b"\x80\x04pickle")
    (folder / "notes.html").write_text("private")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10/model.safetensors").write_bytes(b"x")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = publish(folder, "me/model", api=client(hub), card=CardOptions(license="mit", base_model="owner/base"))
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}, "the folder was changed"
    held = hub.head("me/model").files
    assert hub.requests.count("commit") == 1 and done.confirmed and done.revision == hub.head("me/model").oid
    assert set(held) == {*done.files, ".gitattributes"}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "certificate.json", "immunization.json",
            "report.html", "curve.png", "LICENSE", "README.md", "SHA256SUMS"} <= set(held)
    certificate = Certificate.read(folder / "certificate.json")
    assert set(certificate.traces) <= set(held)
    assert set(done.left_out) == {"run.json", "training_args.bin", "notes.html"}
    assert held["certificate.json"] == (folder / "certificate.json").read_bytes()
    card = ModelCard(held["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("mit", "owner/base") and '"me/model"' in card.text


def test_the_seal_is_one_that_other_tools_read(hub, tmp_path):
    publish(certified(tmp_path), "me/model", api=client(hub))
    held = hub.head("me/model").files
    lines = dict(reversed(line.split("  ", 1)) for line in held["SHA256SUMS"].decode().splitlines())
    assert set(lines) == set(held) - {"SHA256SUMS", "README.md", ".gitattributes"}


def test_a_dry_run_asks_nothing_of_the_network(hub, tmp_path):
    done = publish(certified(tmp_path), "me/model", api=client(hub), dry_run=True)
    assert hub.requests == [] and done.dry_run and done.revision is None
    real = publish(tmp_path / "condition_number", "me/model", api=client(hub))
    assert real.files == done.files and real.left_out == done.left_out


def test_no_certificate_no_push(hub, tmp_path):
    folder = certified(tmp_path)
    (folder / "certificate.json").unlink()
    with pytest.raises(PublishRefusedError, match=r"expected certificate\.json .* there is no option that skips this"):
        publish(folder, "me/model", api=client(hub), allow_failed=True)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "told"),
    [("model.safetensors", "not the weights that were examined"), ("certificate.json", "expected JSON"),
     ("traces/subject/linear_probe_adam__learning_rate=0.1__seed0.json", "not the trace that was certified")],
)
def test_changed_files_are_never_let_out(hub, tmp_path, name, told):
    folder = certified(tmp_path)
    (folder / name).write_bytes(b"changed")
    with pytest.raises(PublishRefusedError, match=f"(?s){name.split('/')[-1]}: .*{told}.*no option skips this"):
        publish(folder, "me/model", api=client(hub), allow_failed=True)
    assert hub.requests == []


def test_an_expired_certificate_is_never_let_out(hub, tmp_path):
    folder = certified(tmp_path, expires="2020-01-01")
    with pytest.raises(PublishRefusedError, match="expired on 2020-01-01"):
        publish(folder, "me/model", api=client(hub), allow_failed=True)
    assert hub.requests == []


def test_a_model_that_fails_needs_the_flag_and_its_card_opens_with_it(hub, tmp_path):
    folder = failing(tmp_path)
    with pytest.raises(PolicyUnmetError, match="asks for RESISTS overall, the certificate says FAILS"):
        publish(folder, "me/model", api=client(hub))
    assert hub.requests == []
    publish(folder, "me/model", api=client(hub), allow_failed=True)
    body = ModelCard(hub.head("me/model").files["README.md"].decode()).text
    opening = body[: body.index("## What it is")]
    assert "failed its immunization exam" in opening and "`ridge_probe`" in opening and "`lora`" in opening


@pytest.mark.parametrize("name", ["model.safetensors", "certificate.json",
                                  "traces/subject/linear_probe_adam__learning_rate=0.1__seed0.json"])
def test_files_that_change_while_publishing(hub, tmp_path, monkeypatch, name):
    folder = certified(tmp_path)
    from hf_immunize.hub import release as room

    honest = room.render_card

    def meddling(*given):
        card = honest(*given)
        (folder / name).write_bytes(b"{}")
        return card

    monkeypatch.setattr(room, "render_card", meddling)
    with pytest.raises(PublishRefusedError, match=f"expected {name} to stay as it was verified"):
        publish(folder, "me/model", api=client(hub))
    assert hub.requests == []


@pytest.mark.parametrize("name", ["config.json", "immunization.json"])
@pytest.mark.parametrize("secret", [TOKEN, "hf_" + "a1B2" * 9])
def test_secrets_in_files_are_not_published(hub, tmp_path, name, secret):
    folder = certified(tmp_path)
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace('"vit"', f'"{secret}"').replace('"objective"', f'"{secret}"'))
    with pytest.raises(PublishRefusedError, match=f"got one in {name}") as error:
        publish(folder, "me/model", api=client(hub))
    assert hub.requests == [] and secret not in str(error.value)


def test_remote_code_is_not_published(hub, tmp_path):
    folder = certified(tmp_path)
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.Mine"}}')
    with pytest.raises(PublishRefusedError, match="got 'auto_map' in config.json"):
        publish(folder, "me/model", api=client(hub))


def test_private_repositories(hub, tmp_path):
    folder = certified(tmp_path)
    publish(folder, "me/hidden", api=client(hub), private=True)
    assert hub.repositories["me/hidden"].private
    publish(folder, "me/open", api=client(hub))
    commits = hub.requests.count("commit")
    with pytest.raises(PublishRefusedError, match="expected a private repository, got the public me/open"):
        publish(folder, "me/open", api=client(hub), private=True)
    assert hub.requests.count("commit") == commits


def test_a_branch(hub, tmp_path):
    folder = certified(tmp_path)
    publish(folder, "me/model", api=client(hub), branch="candidate")
    assert set(hub.head("me/model").files) == {".gitattributes"}
    _, found = verify_model("me/model", revision="candidate", api=client(hub), cache_dir=tmp_path / "cache")
    assert found.ok


def test_a_pull_request(hub, tmp_path):
    hub.put_revision("me/model", {".gitattributes": b""})
    done = publish(certified(tmp_path), "me/model", api=client(hub), create_pr=True)
    assert done.pull_request.endswith("/discussions/1") and done.confirmed
    assert set(hub.head("me/model").files) == {".gitattributes"} and "create" not in hub.requests
    assert "certificate.json" in hub.head("me/model", "refs/pr/1").files
    with pytest.raises(ConfigError, match="a branch or a pull request, got both"):
        publish(tmp_path / "condition_number", "me/model", api=client(hub), create_pr=True, branch="x")


def test_files_of_a_former_revision_go_in_the_same_commit(hub, tmp_path):
    hub.put_revision("me/model", {
        ".gitattributes": b"", "pytorch_model.bin": b"\x80\x04", "model-00001-of-00002.safetensors": b"old",
        "photo.png": b"\x89PNG", "README.md": b"old", "tokenizer.json": b"{}",
    })
    done = publish(certified(tmp_path), "me/model", api=client(hub))
    held = hub.head("me/model").files
    assert set(done.deleted) == {"pytorch_model.bin", "model-00001-of-00002.safetensors", "tokenizer.json"}
    assert not set(done.deleted) & set(held) and "photo.png" in held and held["README.md"] != b"old"
    _, found = verify_model("me/model", api=client(hub), cache_dir=tmp_path / "cache")
    assert found.ok


def test_a_repository_that_would_drop_files_in_silence(hub, tmp_path):
    hub.put_revision("me/model", {".gitignore": b"traces/"})
    with pytest.raises(PublishRefusedError, match=r"without \.gitignore"):
        publish(certified(tmp_path), "me/model", api=client(hub))


def test_publishing_twice_changes_nothing(hub, tmp_path):
    folder = certified(tmp_path)
    first, second = (publish(folder, "me/model", api=client(hub)) for _ in range(2))
    assert first.revision == second.revision and second.confirmed and hub.requests.count("commit") == 1


def test_somebody_else_published_in_between(hub, tmp_path):
    folder = certified(tmp_path)
    hub.put_revision("me/model", {".gitattributes": b""})
    hub.on_request = lambda number, name, phase: (
        hub.put_revision("me/model", {"theirs.txt": b"theirs"}) if (name, phase) == ("batch", "after") else None)
    with pytest.raises(HubError, match=r"HTTP 412 .*somebody else published in between.* Nothing was published\."):
        publish(folder, "me/model", api=client(hub))
    assert set(hub.head("me/model").files) == {"theirs.txt"}


def test_a_hub_that_keeps_other_files_than_were_sent(hub, tmp_path, monkeypatch):
    folder = certified(tmp_path)
    honest = hub.put_revision

    def lossy(repo, files, branch="main", title=""):
        return honest(repo, {name: data for name, data in files.items() if name != "immunization.json"}, branch, title)

    monkeypatch.setattr(hub, "put_revision", lossy)
    with pytest.raises(HubError, match="got others for immunization.json: do not use that revision"):
        publish(folder, "me/model", api=client(hub))


def test_a_signed_publication(hub, tmp_path):
    key = make_key(tmp_path / "key.pem")
    assert (tmp_path / "key.pem").stat().st_mode & 0o077 == 0
    publish(certified(tmp_path), "me/model", api=client(hub), signing_key=tmp_path / "key.pem",
            policy=asking(signed=True))
    _, found = verify_model("me/model", api=client(hub), cache_dir=tmp_path / "cache", trusted_key=key,
                            policy=asking(signed=True))
    assert found.ok and found.signed_by == key


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a/b.pkl", "../../evil.json", "a\u202eb.json", "x" * 400])
def test_a_repository_with_pickles_or_unsafe_names_is_not_downloaded(hub, tmp_path, name):
    publish(certified(tmp_path), "me/model", api=client(hub))
    hub.put_revision("me/model", hub.head("me/model").files | {name: b"\x80\x04"})
    with pytest.raises(VerificationError, match="files that may not be downloaded"):
        verify_model("me/model", api=client(hub), cache_dir=tmp_path / "cache")
    assert "resolve" not in hub.requests and not list(tmp_path.rglob("*evil*"))


def test_the_commit_that_was_verified_is_the_one_that_is_used(hub, tmp_path):
    publish(certified(tmp_path), "me/model", api=client(hub))
    good = hub.head("me/model")
    hub.on_request = lambda number, name, phase: (
        hub.put_revision("me/model", {"config.json": b"{}"}) if (name, phase) == ("info", "after") else None)
    folder, found = verify_model("me/model", api=client(hub), cache_dir=tmp_path / "cache")
    assert found.ok and folder.name == good.oid


def test_offline_from_the_cache(hub, tmp_path):
    publish(certified(tmp_path), "me/model", api=client(hub))
    cache = tmp_path / "cache"
    _, found = verify_model("me/model", revision="main", api=client(hub), cache_dir=cache)
    asked = len(hub.requests)
    oid = hub.head("me/model").oid
    _, again = verify_model("me/model", revision=oid, api=client(hub), cache_dir=cache, local_files_only=True)
    assert found.ok and again.ok and len(hub.requests) == asked


def test_links_of_the_cache_are_followed_and_no_others(hub, tmp_path):
    publish(certified(tmp_path), "me/model", api=client(hub))
    folder, found = verify_model("me/model", api=client(hub), cache_dir=tmp_path / "cache")
    assert found.ok and (folder / "config.json").is_symlink()
    (tmp_path / "other.json").write_bytes((folder / "config.json").read_bytes())
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "other.json")
    from hf_immunize.hub import verify_folder

    assert ("link", "config.json") in {(item.code, item.file) for item in verify_folder(folder).findings}


def test_targets_that_are_neither_folder_nor_repository(tmp_path):
    with pytest.raises(ConfigError, match="expected a folder or 'owner/name'"):
        verify_model("no/such/thing")
    with pytest.raises(ConfigError, match="a revision only with a Hub repository"):
        verify_model(tmp_path, revision="main")
    with pytest.raises(RecordError):
        publish(tmp_path / "none", "me/model")
    assert git_digest(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


def test_a_control_that_is_not_the_base_that_the_card_names_is_not_published(hub, tmp_path):
    folder = certified(tmp_path)
    weights = (tmp_path / "base/model.safetensors").read_bytes()
    card = CardOptions(license="mit", base_model="owner/base")
    hub.put_revision("owner/base", {"model.safetensors": b"a weaker model", ".gitattributes": b""})
    with pytest.raises(PublishRefusedError, match="control to be owner/base, got other weights"):
        publish(folder, "me/model", api=client(hub), card=card)
    assert "commit" not in hub.requests
    hub.put_revision("owner/base", {"model.safetensors": weights, ".gitattributes": b""})
    assert publish(folder, "me/model", api=client(hub), card=card).control_compared
    elsewhere = CardOptions(license="mit", base_model="owner/not-there")
    assert not publish(folder, "me/model", api=client(hub), card=elsewhere).control_compared
