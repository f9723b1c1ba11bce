"""Who says so: three levels, in ``verify``, in its JSON and in the card. Keys are real, exams synthetic."""

import json
import re
import shutil

import pytest
import record_builders as build
from published import certified, reseal, write_release
from typer.testing import CliRunner

from hf_immunize.cli import app
from hf_immunize.errors import ConfigError
from hf_immunize.hub import verify_folder
from hf_immunize.hub.levels import Trust
from hf_immunize.hub.signature import default_key_file, make_key
from hf_immunize.hub.trust import sign_recheck
from hf_immunize.records import Certificate, RecheckRecord, RepeatedTrial, sha256_file


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    root = tmp_path_factory.mktemp("keys")
    return {name: (root / f"{name}.pem", make_key(root / f"{name}.pem")) for name in ("publisher", "checker", "other")}


@pytest.fixture(scope="module")
def made(tmp_path_factory, keys):
    root = tmp_path_factory.mktemp("made")
    return write_release(certified(root), root / "published", signing_key=keys["publisher"][0])


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "model")


def rechecked(folder, key, *, agrees=True, attack="linear_probe_adam", certificate=None):
    """A recheck of one run, signed, put beside the certificate after it was sealed."""
    record = RecheckRecord(
        certificate_sha256=certificate or sha256_file(folder / "certificate.json"), drawn_with=7, drawn_from=12,
        cells=2,
        trials=[RepeatedTrial(attack=attack, role="subject", trial="rate=1", seeds=[0], evaluations=9, distance=0.1,
                              bound=0.2, agrees=agrees, told="synthetic")],
        verdicts={attack: "RESISTS"}, overturned=[], provenance=build.PROVENANCE,
    )
    name, data = sign_recheck(record, key)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return folder / name


def found(folder, keys, publisher=None, *checkers):
    return verify_folder(folder, trusted_key=publisher and keys[publisher][1],
                         checker_keys=[keys[name][1] for name in checkers])


def test_without_a_key_that_the_reader_named_it_is_self_reported(folder, keys):
    seen = found(folder, keys)
    assert seen.ok and seen.trust == Trust() and str(seen.trust) == "self-reported"
    assert seen.signed_by == keys["publisher"][1] and "signature" in {item.code for item in seen.findings}


def test_signed_by_the_key_that_the_reader_named(folder, keys):
    public = keys["publisher"][1]
    assert str(found(folder, keys, "publisher").trust) == f"signed by {public}"
    assert str(found(folder, keys, "other").trust) == "self-reported"


def test_repeated_by_a_checker_that_the_reader_named(folder, keys):
    rechecked(folder, keys["checker"][0])
    seen = found(folder, keys, "publisher", "checker")
    assert seen.ok and str(seen.trust) == f"repeated by {keys['checker'][1]} (1 cells of 2)"
    assert seen.as_json()["trust"] == {"level": "repeated", "key": keys["checker"][1], "cells": 1, "of": 2,
                                       "told": str(seen.trust)}
    unnamed = found(folder, keys, "publisher")
    assert unnamed.trust.level == "signed" and "recheck-unknown" in {item.code for item in unnamed.findings}


def test_publishers_cannot_repeat_themselves_and_unheard_attacks_do_not_count(folder, keys):
    rechecked(folder, keys["publisher"][0])
    assert found(folder, keys, "publisher", "publisher").trust.level == "signed"
    rechecked(folder, keys["checker"][0], attack="an attack that the certificate does not have")
    assert found(folder, keys, "publisher", "checker").trust.level == "signed"


def test_a_recheck_that_did_not_hold_refuses_when_its_key_is_named_and_is_told_otherwise(folder, keys):
    path = rechecked(folder, keys["checker"][0], agrees=False)
    seen = found(folder, keys, "publisher", "checker")
    assert not seen.sound and seen.trust == Trust()
    assert any(item.file == f"rechecks/{path.name}" and "linear_probe_adam did not come out" in item.message
               for item in seen.findings)
    assert found(folder, keys, "publisher").ok


def test_a_recheck_of_another_certificate_or_with_a_forged_signature(folder, keys):
    path = rechecked(folder, keys["checker"][0], certificate="0" * 64)
    seen = found(folder, keys, "publisher", "checker")
    assert seen.ok and seen.trust.level == "signed" and "recheck-other" in {item.code for item in seen.findings}
    path = rechecked(folder, keys["checker"][0])
    forged = json.loads(path.read_text())
    path.write_text(json.dumps(forged | {"record": forged["record"].replace('"cells": 2', '"cells": 1')}))
    seen = found(folder, keys, "publisher", "checker")
    assert not seen.sound and any(item.code == "recheck" and "another signature" in item.message
                                  for item in seen.findings)


def test_the_card_says_who_and_may_not_say_more_than_the_folder_bears_out(folder, keys, tmp_path):
    card, public = (folder / "README.md").read_text(), keys["publisher"][1]
    assert f"**Who says so:** signed by `{public}`; whose keys these are, you have to know." in card
    more = f"signed by `{public}`; repeated by `{keys['checker'][1]}` (2 cells of 2)"
    (folder / "README.md").write_text(card.replace(f"signed by `{public}`", more))
    seen = found(folder, keys)
    assert any(item.code == "card" and "repeated by" in item.message for item in seen.findings)
    (folder / "README.md").write_text(re.sub(r"(?m)^\*\*Who says so:\*\* .*$",
                                             "**Who says so:** the Ministry of Safety.", card))
    assert any(item.code == "card" and "opening" in item.message for item in found(folder, keys).findings)
    (folder / "README.md").write_text(card)
    rechecked(folder, keys["checker"][0])
    assert found(folder, keys).ok, "a recheck that came later is not in the card, which is no lie"
    again = write_release(folder, tmp_path / "again", signing_key=keys["publisher"][0])
    assert f"repeated by `{keys['checker'][1]}` (1 cells of 2)" in (again / "README.md").read_text()
    assert found(again, keys, "publisher", "checker").trust.level == "repeated"


def test_a_signature_by_nobody_in_particular_lifts_nothing(folder, keys):
    reseal(folder, keys["other"][0])
    assert found(folder, keys).trust.level == "self-reported"


def test_publish_signs_when_a_key_is_there_and_only_then(tmp_path, keys, monkeypatch):
    source = certified(tmp_path)
    assert not (write_release(source, tmp_path / "bare") / "certificate.sig").exists()
    assert "**Who says so:** self-reported" in (tmp_path / "bare/README.md").read_text()
    public = make_key(default_key_file())
    signed = write_release(source, tmp_path / "signed")
    assert str(verify_folder(signed, trusted_key=public).trust) == f"signed by {public}"
    assert not (write_release(source, tmp_path / "unsigned", sign_by_default=False) / "certificate.sig").exists()
    monkeypatch.setenv("HF_IMMUNIZE_SIGNING_KEY", str(keys["other"][0]))
    other = write_release(source, tmp_path / "other")
    assert verify_folder(other, trusted_key=keys["other"][1]).trust.level == "signed"
    monkeypatch.setenv("HF_IMMUNIZE_SIGNING_KEY", str(tmp_path / "nowhere.pem"))
    with pytest.raises(ConfigError, match="which HF_IMMUNIZE_SIGNING_KEY names, got no file"):
        write_release(source, tmp_path / "lost")


def test_keygen_puts_the_key_where_publish_looks():
    done = CliRunner().invoke(app, ["keygen"])
    assert done.exit_code == 0 and default_key_file().is_file() and re.fullmatch(r"[0-9a-f]{64}\n", done.stdout)
    assert default_key_file().stat().st_mode & 0o077 == 0


def test_the_first_line_of_verify(folder, keys):
    def first(*words):
        return CliRunner().invoke(app, ["verify", str(folder), *words]).stdout.splitlines()[0]

    publisher, checker = keys["publisher"][1], keys["checker"][1]
    said = "Intact: the files are what the certificate says. It says: RESISTS."
    assert first() == f"Self-reported. {said}"
    assert first("--trusted-key", publisher) == f"Signed by {publisher}. {said}"
    rechecked(folder, keys["checker"][0])
    assert first("--checker-key", checker) == f"Repeated by {checker} (1 cells of 2). {said}"
    (folder / "config.json").write_text("{}")
    assert first("--trusted-key", publisher).startswith("UNSOUND: ")


def test_nothing_is_called_verified(folder):
    certificate = Certificate.read(folder / "certificate.json")
    shown = CliRunner().invoke(app, ["verify", str(folder)]).stdout + (folder / "README.md").read_text()
    assert "VERIFIED" not in shown and certificate.overall in shown
