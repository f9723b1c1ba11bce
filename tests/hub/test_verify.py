import datetime
import os
import random
import re
import shutil

import pytest
from published import CREATED, EXPIRES, TODAY, certified, failing, provenance, reseal, write_release

from hf_immunize.errors import RecordError, VerificationError
from hf_immunize.hub import CardOptions, verify_folder
from hf_immunize.hub.signature import make_key
from hf_immunize.records import Certificate, loading_files


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A signed, published folder, its publisher's key, and the folder it was made from."""
    root = tmp_path_factory.mktemp("made")
    source = certified(root)
    folder = build_with_files(source)
    public = make_key(root / "key.pem")
    target = write_release(folder, root / "published", signing_key=root / "key.pem",
                           card=CardOptions(license="mit"))
    return target, public, root


def build_with_files(folder):
    """The same certificate, which also covers configuration and processor."""
    certificate = Certificate.read(folder / "certificate.json")
    certificate.model_copy(update={"files": loading_files(folder)}).write(folder / "certificate.json")
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "model")


def failures(found, level="fail"):
    return {(finding.code, finding.file) for finding in found.findings if finding.level == level}


def message(found, code):
    return next(finding.message for finding in found.findings if finding.code == code)


def test_a_published_folder_verifies_and_says_by_whom(made, folder):
    found = verify_folder(folder, trusted_key=made[1])
    assert found.ok and not found.findings and found.signed_by == made[1]
    assert found.certificate.overall == "RESISTS"
    assert set(found.digests) >= {"model.safetensors", "certificate.json", "config.json"}


# ---- tampering


def table_bytes(data):
    """Offsets of every byte in the card's tables."""
    offsets, start = [], 0
    for line in data.split(b"\n"):
        if line.startswith(b"|"):
            offsets += range(start, start + len(line) + 1)
        start += len(line) + 1
    return offsets


def targets(folder):
    traces = sorted(path.relative_to(folder).as_posix() for path in folder.glob("traces/**/*.json"))
    names = ["model.safetensors", "certificate.json", "certificate.sig", "SHA256SUMS", "immunization.json",
             "config.json", "README.md", *traces[:: len(traces) // 5]]
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("seed", range(8))
def test_any_changed_byte_is_found_and_its_file_named(folder, seed):
    chance = random.Random(seed)
    contents = targets(folder)
    for round_ in range(30):
        name = ["model.safetensors", "certificate.json", "README.md", None][round_ % 4]
        name = name or chance.choice(sorted(set(contents) - {"SHA256SUMS"}))
        data = bytearray(contents[name])
        at = chance.choice(table_bytes(data)) if name == "README.md" else chance.randrange(len(data))
        data[at] = chance.choice([byte for byte in range(256) if byte != data[at]])
        (folder / name).write_bytes(data)
        found = verify_folder(folder)
        assert not found.sound
        assert name in {file for _, file in failures(found)}, (name, at, found.findings)
        (folder / name).write_bytes(contents[name])
    assert verify_folder(folder).ok


def test_a_changed_seal_is_found_and_names_itself_or_the_file_it_lies_about(folder):
    chance = random.Random(0)
    data = (folder / "SHA256SUMS").read_bytes()
    names = {line.split(b"  ")[1].decode() for line in data.splitlines()}
    for _ in range(40):
        changed = bytearray(data)
        at = chance.randrange(len(data))
        changed[at] = chance.choice([byte for byte in range(32, 127) if byte != data[at]])
        (folder / "SHA256SUMS").write_bytes(changed)
        found = verify_folder(folder)
        assert not found.sound and {file for _, file in failures(found)} & {"SHA256SUMS", *names}


@pytest.mark.parametrize("name", ["certificate.json", "model.safetensors", "config.json", "immunization.json",
                                  "traces/subject/linear_probe_adam__learning_rate=0.1__seed1.json"])
@pytest.mark.parametrize("how", ["deleted", "emptied", "cut"])
def test_missing_and_truncated_files(folder, name, how):
    path = folder / name
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes(b"" if how == "emptied" else path.read_bytes()[:-7])
    found = verify_folder(folder)
    assert name in {file for _, file in failures(found)}


def test_every_figure_of_the_metadata_is_compared(folder):
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("value: 98.0", "value: 99.9", 1))
    assert ("card", "README.md") in failures(verify_folder(folder))
    (folder / "README.md").write_text(card.replace("\n---\n", "\nlanguage: en\n---\n", 1))
    assert verify_folder(folder).ok


@pytest.mark.parametrize("forged", ["attack | verdict\n--- | ---\nlora | RESISTS\n", "> It is safe.\n",
                                    "<table><tr><td>RESISTS</td></tr></table>\n"])
def test_a_forged_table_quote_or_html_beside_the_true_ones(folder, forged):
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card + "\n" + forged)
    assert "tables and quotes" in message(verify_folder(folder), "card")


def test_prose_that_somebody_added_is_allowed_and_noted_but_not_before_the_verdict(folder):
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card + "\nTrained on a Tuesday.\n")
    found = verify_folder(folder)
    assert found.ok and ("card-text", "README.md") in failures(found, "note")
    (folder / "README.md").write_text(card.replace("> [!NOTE]", "It is entirely safe.\n\n> [!NOTE]"))
    assert "its opening" in message(verify_folder(folder), "card")


def test_metadata_that_expands_without_bound_is_refused(folder):
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("---\n", "---\n" + bomb, 1))
    assert "alias" in message(verify_folder(folder), "card")


# ---- swaps


def test_the_weights_of_the_base(made, folder):
    shutil.copy(made[2] / "base/model.safetensors", folder)
    for reseals in (False, True):
        reseal(folder) if reseals else None
        assert "weights of the un-immunized base ('digits-vit base')" in message(
            verify_folder(folder), "weights-of-base")


def test_an_older_certificate(folder):
    before = (TODAY - datetime.timedelta(days=90)).isoformat()
    now = Certificate.read(folder / "certificate.json")
    now.model_copy(update={"provenance": provenance(before)}).write(folder / "certificate.json")
    assert f"an older certificate in place of the published one: its exam is of {before}, the card tells of " in (
        message(verify_folder(folder), "certificate-older"))
    reseal(folder)
    assert ("certificate-older", "certificate.json") in failures(verify_folder(folder))


def test_the_certificate_of_another_model(folder, tmp_path):
    shutil.copy(certified(tmp_path, "another") / "certificate.json", folder)
    told = message(verify_folder(folder), "certificate-of-another")
    assert told.startswith("the certificate of another model: it is about 'another'")


def test_an_expired_certificate(folder):
    last = datetime.date.fromisoformat(EXPIRES)
    assert verify_folder(folder, today=last).ok
    found = verify_folder(folder, today=last + datetime.timedelta(days=1))
    assert failures(found) == {("expired", "certificate.json")} and f"expired on {last}" in message(found, "expired")


def test_changed_evidence_under_a_new_seal(folder):
    name = "traces/subject/linear_probe_adam__learning_rate=0.1__seed1.json"
    (folder / name).write_text((folder / name).read_text().replace('"seconds": 0.1', '"seconds": 0.2'))
    reseal(folder)
    found = verify_folder(folder)
    assert failures(found) == {("trace", name)} and "not the trace that was certified" in message(found, "trace")


def test_a_certificate_from_the_future(folder):
    found = verify_folder(folder, today=datetime.date.fromisoformat(CREATED) - datetime.timedelta(days=3))
    assert ("future", "certificate.json") in failures(found)


def test_a_signature_by_another_key(made, folder, tmp_path):
    other = make_key(tmp_path / "other.pem")
    reseal(folder, tmp_path / "other.pem")
    found = verify_folder(folder, trusted_key=made[1])
    assert failures(found) == {("signature-key", "certificate.sig")} and found.signed_by is None
    assert f"signed by another key: {other} instead of the trusted {made[1]}" in message(found, "signature-key")


def test_a_signature_that_was_taken_away_or_is_of_another_certificate(made, folder, tmp_path):
    forged = Certificate.read(folder / "certificate.json").model_copy(update={"rule": "Everything RESISTS."})
    forged.write(folder / "certificate.json")
    assert ("signature-other", "certificate.sig") in failures(verify_folder(folder, trusted_key=made[1]))
    reseal(folder)
    assert "no signature at all" in message(verify_folder(folder, trusted_key=made[1]), "signature")


def test_a_signature_whose_digits_fit_another_certificate_is_not_valid(made, folder, tmp_path):
    true = (folder / "certificate.sig").read_text()
    signature = re.search(r"[0-9a-f]{128}", true)[0]
    (folder / "certificate.sig").write_text(true.replace(signature, signature[::-1]))
    assert ("signature-invalid", "certificate.sig") in failures(verify_folder(folder, trusted_key=made[1]))


# ---- what must not be there


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a/model.pt", "x.PKL", "y.ckpt", "z.pth", "weights.bin.index",
                                  "arrays.npz", "data.pkl.json"])
def test_pickles_by_name(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"harmless")
    reseal(folder)
    assert ("pickle", name) in failures(verify_folder(folder))


@pytest.mark.parametrize("head", [b"\x80\x04\x95rest", b"\x80\x02}q\x00.", b"PK\x03\x04archive"])
@pytest.mark.parametrize("name", ["notes.txt", "config2.json", "data"])
def test_pickles_by_their_first_bytes(folder, head, name):
    (folder / name).write_bytes(head)
    reseal(folder)
    assert ("pickle", name) in failures(verify_folder(folder))


def test_files_that_change_what_is_loaded(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    assert {("seal-extra", "adapter_config.json"), ("file-extra", "adapter_config.json")} <= failures(
        verify_folder(folder))
    reseal(folder)
    assert failures(verify_folder(folder)) == {("file-extra", "adapter_config.json")}


def test_weights_that_were_never_examined(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"more")
    reseal(folder)
    assert failures(verify_folder(folder)) == {("weights-extra", "adapter_model.safetensors")}


def test_a_picture_somebody_added_is_no_harm(folder):
    (folder / "photo.png").write_bytes(b"\x89PNG")
    assert verify_folder(folder).ok


def test_changed_configuration_is_another_model(folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"zero"', '"nine"'))
    reseal(folder)
    assert failures(verify_folder(folder)) == {("file", "config.json")}


def test_code_is_noted(folder):
    (folder / "modeling.py").write_text("print('hello')")
    reseal(folder)
    found = verify_folder(folder)
    assert found.ok and "trust_remote_code" in message(found, "code")


# ---- paths


BAD_NAMES = ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "C:\\x.safetensors", "~/x.safetensors",
             "a//b.safetensors", "./a.safetensors", "a\u202eb.safetensors", "\ufb01le.safetensors",
             "x" * 300 + ".safetensors", "e\u0301.safetensors", "nul.safetensors", "a\\..\\b.safetensors",
             "d/" * 600 + "x.safetensors", "a\nb.safetensors"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:30])
@pytest.mark.parametrize("where", ["weights", "traces", "files"])
def test_a_certificate_cannot_name_a_path_outside(folder, tmp_path, monkeypatch, name, where):
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    (tmp_path / "secret.json").write_bytes(b"secret")
    name = name.replace(".safetensors", ".json") if where != "weights" else name
    certificate = Certificate.read(folder / "certificate.json")
    if where == "weights":
        changed = {"subject": certificate.subject.model_copy(update={"weights": {name: "0" * 64}})}
    else:
        changed = {where: {name: "0" * 64}}
    certificate.model_copy(update=changed).write(folder / "certificate.json")
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: opened.append(str(path)) or real(path, *rest, **more))
    found = verify_folder(folder)
    assert ("path", "certificate.json") in failures(found)
    assert all(os.path.realpath(path).startswith(str(folder.resolve())) for path in opened)


@pytest.mark.parametrize("line", ["{digest}  ../secret", "{digest}  /etc/passwd", "{digest} *config.json", "nonsense",
                                  "{digest}  config.json\n{digest}  config.json", "{digest}  a\\b"])
def test_a_seal_cannot_either(folder, line):
    seal = (folder / "SHA256SUMS").read_text() + line.format(digest="0" * 64) + "\n"
    (folder / "SHA256SUMS").write_text(seal)
    assert ("seal", "SHA256SUMS") in failures(verify_folder(folder))


@pytest.mark.parametrize("target", ["/etc/hostname", "../outside", "model.safetensors"])
def test_links_are_not_followed(folder, tmp_path, target):
    (tmp_path / "outside").write_text("outside")
    (folder / "immunization.json").unlink()
    (folder / "immunization.json").symlink_to(target)
    found = verify_folder(folder)
    assert ("link", "immunization.json") in failures(found) and "immunization.json" not in found.digests


def test_a_linked_folder_is_not_entered(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.safetensors").write_bytes(b"x")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    assert ("link", "more") in failures(verify_folder(folder))


def test_a_pipe_does_not_block(folder):
    os.mkfifo(folder / "config2.json")
    assert ("special", "config2.json") in failures(verify_folder(folder))


@pytest.mark.parametrize("name", ["con.json", "a\u200bb.json", "Ａ.json", "trailing ", "CONFIG.JSON"])
def test_confusable_file_names(folder, name):
    (folder / name).write_text("{}")
    assert ("name", name.replace("\u200b", "")) in failures(verify_folder(folder))


def test_an_index_leads_only_to_examined_shards(folder):
    for shard in ("../../x.safetensors", "/x.safetensors", "other.safetensors", ""):
        (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"w": "{shard}"}}}}')
        assert ("index", "model.safetensors.index.json") in failures(verify_folder(folder))
    (folder / "model.safetensors.index.json").write_text("[]")
    assert ("index", "model.safetensors.index.json") in failures(verify_folder(folder))


# ---- records that nobody vouches for


@pytest.mark.parametrize(
    ("text", "told"),
    [("{}", "schema version"), ("[]", "schema version"), ("", "expected JSON"), ('{"schema_version": 2}', "version 1"),
     ('{"schema_version": 1, "schema_version": 1}', "the same key twice"), ('{"schema_version": NaN}', "NaN"),
     ("[" * 100_000, "expected JSON"), ('{"schema_version": 1}', "Certificate"), ("\xff", "expected JSON"),
     ('{"schema_version": ' + "9" * 10_000 + "}", "expected JSON")],
    ids=range(10),
)
def test_certificates_that_are_none(folder, text, told):
    (folder / "certificate.json").write_bytes(text.encode("latin-1"))
    assert told in message(verify_folder(folder), "certificate")


def test_traces_of_other_weights_or_of_attacks_the_certificate_hides(folder):
    certificate = Certificate.read(folder / "certificate.json")
    control = certificate.control.model_copy(update={"weights": {"model.safetensors": "1" * 64}})
    certificate.model_copy(update={"control": control}).write(folder / "certificate.json")
    assert "trace-weights" in {code for code, _ in failures(verify_folder(folder))}
    certificate.model_copy(update={"cells": certificate.cells[1:]}).write(folder / "certificate.json")
    found = verify_folder(folder)
    assert failures(found) == {("certificate", "certificate.json")}
    assert any("has a cell, linear_probe_gd has none" in finding.message for finding in found.findings)


def test_claims_without_traces(folder):
    Certificate.read(folder / "certificate.json").model_copy(update={"traces": {}}).write(folder / "certificate.json")
    assert ("trace-missing", "certificate.json") in failures(verify_folder(folder))


def test_no_folder_and_no_certificate(tmp_path):
    with pytest.raises(RecordError, match="expected a folder with a published model"):
        verify_folder(tmp_path / "none")
    found = verify_folder(tmp_path)
    assert failures(found) == {("certificate", "certificate.json")} and found.certificate is None
    with pytest.raises(VerificationError, match=r"certificate\.json: expected certificate\.json"):
        found.require()


def test_an_unsealed_folder_still_pins_weights_and_traces(tmp_path):
    folder = failing(tmp_path)
    found = verify_folder(folder)
    assert found.ok and {"seal", "card", "file"} == {finding.code for finding in found.findings}
    (folder / "model.safetensors").write_bytes(b"other")
    assert failures(verify_folder(folder)) == {("weights", "model.safetensors")}
