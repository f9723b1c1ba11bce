"""docs/downloaded.md, "What to believe": every sentence on what a liar could still have done, done.

A sentence without its test here, or a test without its sentence, fails ``test_every_sentence_has_its_test``.
"""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import record_builders as build
from preset_exam import PRESET, preset_exam
from published import reseal, write_release

from hf_immunize.certification import Evidence, judge_traces
from hf_immunize.certification.primary_rows import judge_utility
from hf_immunize.hub import Policy, verify_folder
from hf_immunize.hub.signature import make_key
from hf_immunize.hub.trust import sign_recheck
from hf_immunize.records import AttackTrace, Certificate, RecheckRecord, RepeatedTrial, UtilityRows, sha256_file

PAGE = Path(__file__).parents[2] / "docs/downloaded.md"


def slug(sentence):
    """The name of a sentence's test: its words up to the first colon or semicolon."""
    return "test_" + "_".join(re.findall(r"[a-z0-9]+", re.split("[:;]", sentence)[0].lower()))


def test_every_sentence_has_its_test():
    section = PAGE.read_text(encoding="utf-8").split("## What to believe")[1]
    sentences = [" ".join(found.split()) for found in re.findall(r"^- (.*?)(?=\n-|\n\n|\Z)", section, re.M | re.S)]
    assert len(sentences) >= 9
    named = {slug(sentence) for sentence in sentences}
    mine = {name for name in globals() if name.startswith("test_") and name != "test_every_sentence_has_its_test"}
    assert named == mine, (sorted(named - mine), sorted(mine - named))


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """An honest ``quick`` exam that two attacks break."""
    return preset_exam(tmp_path_factory.mktemp("honest"), PRESET)


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    path = tmp_path_factory.mktemp("key") / "key.pem"
    return path, make_key(path)


@pytest.fixture(scope="module")
def release(honest, tmp_path_factory, key):
    root = tmp_path_factory.mktemp("release")
    return write_release(shutil.copytree(honest, root / "source"), root / "published", signing_key=key[0],
                         allow_failed=True)


@pytest.fixture
def published(release, tmp_path):
    """Its release, signed, which a lie may change."""
    return shutil.copytree(release, tmp_path / "published")


def flat(trace):
    """An attack on the model that got nowhere."""
    if trace.role != "subject" or trace.attack.startswith("benign_") or not trace.curve:
        return trace
    return trace.model_copy(update={"curve": [
        point.model_copy(update={"test": 0.2 + 0.05 * point.test, "validation": 0.2 + 0.05 * point.validation})
        for point in trace.curve]})


def invent(folder, plan=None, keep=lambda trace: True, change=flat, **given):
    """Traces that were made up, and the certificate that the judge makes of them."""
    path = folder / "certificate.json"
    certificate, by_role = Certificate.read(path), {}
    hashes = {}
    for name in certificate.traces:
        trace = AttackTrace.read(folder / name)
        if not keep(trace):
            (folder / name).unlink()
            continue
        if (changed := change(trace)) is not trace:
            trace = changed
            trace.write(folder / name)
        by_role.setdefault(trace.role, []).append(trace)
        hashes[name] = sha256_file(folder / name)
    evidence = dataclasses.replace(Evidence.of_certificate(certificate), traces=hashes, **given)
    made = judge_traces(by_role, plan or certificate.plan, certificate.judged_by, evidence)
    made.write(path)
    return made


def sealed_anew(folder, key_file=None):
    """Card and seal to fit whatever lies there now, as anybody can make them."""
    from hf_immunize.hub import write_card

    (folder / "certificate.sig").unlink(missing_ok=True)
    write_card(folder)
    reseal(folder, key_file)


def recheck(folder, key_file, agrees=True, attack="lora"):
    record = RecheckRecord(
        certificate_sha256=sha256_file(folder / "certificate.json"), drawn_with=3, drawn_from=9, cells=8,
        trials=[RepeatedTrial(role="subject", attack=attack, trial="x", seeds=[0], evaluations=4, distance=0.0,
                              bound=0.1, agrees=agrees, told="never made")],
        verdicts={}, overturned=[], provenance=build.PROVENANCE)
    name, data = sign_recheck(record, key_file)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)


def test_whoever_can_write_to_the_repository_can_replace_weights_evidence_seal_and_card_together(published, key):
    (published / "model.safetensors").write_bytes(b"weights of somebody else")
    certificate = Certificate.read(published / "certificate.json")
    subject = build.fingerprint(published, "x")
    for name in certificate.traces:
        trace = AttackTrace.read(published / name)
        if trace.role == "subject":
            trace.model_copy(update={"model": subject}).write(published / name)
    hashes = {name: sha256_file(published / name) for name in certificate.traces}
    certificate.model_copy(update={"subject": subject, "traces": hashes, "utility_rows": {}}).write(
        published / "certificate.json")
    sealed_anew(published)
    assert str(verify_folder(published).trust) == "self-reported" and verify_folder(published).ok
    assert not verify_folder(published, trusted_key=key[1]).ok, "a signature that was asked for is missing"


def test_whoever_writes_the_certificate_can_write_any_verdict_into_it(published):
    path = published / "certificate.json"
    certificate = Certificate.read(path)
    certificate.model_copy(update={"overall": "RESISTS"}).write(path)
    sealed_anew(published)
    assert verify_folder(published).ok and not verify_folder(published, rejudge=True).sound


def test_whoever_makes_up_traces_and_answers_gets_whatever_verdict_these_give(published):
    assert invent(published).overall == "RESISTS", "an honest exam fails"
    sealed_anew(published)
    assert verify_folder(published, rejudge=True).sound


def test_whoever_names_another_public_model_as_what_attackers_have_lifts_thresholds(published):
    path = published / "certificate.json"
    certificate, more = Certificate.read(path), []
    for name in certificate.traces:
        trace = AttackTrace.read(published / name)
        if trace.role == "control" and trace.attack == "lora":
            more.append(trace.model_copy(update={"role": "alternative", "model": build.other_model(trace.model)}))
    before = {cell.attack: cell.threshold for cell in certificate.cells}
    for trace in more:
        trace.write(published / "traces" / "alternative" / trace.file_name)
    plan = certificate.plan.model_copy(update={"protocol": "custom"})
    named = certificate.traces | {f"traces/alternative/{trace.file_name}": "" for trace in more}
    certificate.model_copy(update={"traces": named}).write(path)
    assert {cell.attack: cell.threshold for cell in invent(published, plan, change=lambda trace: trace).cells} != before
    sealed_anew(published)
    assert verify_folder(published, rejudge=True).sound
    invent(published, certificate.plan, change=lambda trace: trace)
    sealed_anew(published)
    assert any("another public model beside the base" in item.message
               for item in verify_folder(published, rejudge=True).findings if item.level == "fail")


def test_spectra_and_similarities_rest_on_nothing_that_is_published(published):
    path = published / "certificate.json"
    certificate = Certificate.read(path)
    spectra = {side: [found.model_copy(update={"condition_number": 1e9 if side == "immunized" else 1.0})
                      for found in records] for side, records in certificate.spectra.items()}
    assert certificate.spectra["immunized"]
    changed = invent(published, change=lambda trace: trace, spectra=spectra)
    sealed_anew(published)
    assert verify_folder(published, rejudge=True).sound
    assert changed.immunization_ratio != certificate.immunization_ratio
    assert (changed.overall, changed.cells) == (certificate.overall, certificate.cells), "no verdict hangs on them"


def test_whoever_calls_the_exam_one_of_their_own_custom_may_leave_out_what_they_like(published):
    plan = Certificate.read(published / "certificate.json").plan
    only = ("ridge_probe", "lora")
    smaller = plan.model_copy(update={
        "protocol": "custom", "planned": list(only),
        "attacks": [item for item in plan.attacks if item.attack in only]})
    invent(published, smaller, keep=lambda trace: trace.attack in only or trace.attack.startswith("benign_"))
    sealed_anew(published)
    found = verify_folder(published, rejudge=True)
    assert found.sound and "custom" in {item.code for item in found.findings}
    asked = verify_folder(published, policy=Policy(exam="quick"))
    assert any("'custom'" in item.message for item in asked.findings if item.level == "policy")


def test_a_publisher_can_sign_traces_that_they_made_up(published, key):
    invent(published)
    sealed_anew(published, key[0])
    found = verify_folder(published, trusted_key=key[1], rejudge=True)
    assert found.sound and found.trust.level == "signed" and found.certificate.overall == "RESISTS"


def test_a_publisher_can_sign_again_what_they_signed_before(published, key, tmp_path):
    older = shutil.copytree(published, tmp_path / "older")
    sealed_anew(published, key[0])
    for release in (older, published):
        assert verify_folder(release, trusted_key=key[1]).trust.level == "signed"
    certificate = Certificate.read(older / "certificate.json")
    late = Policy(issued_after="2999-01-01", rejudged=False)
    told = [item.message for item in verify_folder(older, policy=late).findings if item.level == "policy"]
    assert any(certificate.provenance.created[:10] in line for line in told), "the date is what a policy can ask for"


def test_trials_that_were_not_drawn_stay_somebody_s_word(published, tmp_path):
    invent(published)
    sealed_anew(published)
    checker = make_key(tmp_path / "checker.pem")
    recheck(published, tmp_path / "checker.pem", attack="earlier_layer_probe")
    found = verify_folder(published, checker_keys=[checker], rejudge=True)
    assert found.sound and "(1 cells of " in str(found.trust), "it says how few"


def test_answers_on_the_primary_rows_are_not_repeated(published, tmp_path):
    (name,) = Certificate.read(published / "certificate.json").utility_rows
    rows = UtilityRows.read(published / name)
    better = rows.model_copy(update={"answers": rows.answers.model_copy(update={"immunized": rows.answers.wanted})})
    better.write(published / name)
    made = invent(published, change=lambda trace: trace, utility=judge_utility(better),
                  utility_rows={name: sha256_file(published / name)})
    sealed_anew(published)
    checker = make_key(tmp_path / "checker.pem")
    recheck(published, tmp_path / "checker.pem")
    found = verify_folder(published, checker_keys=[checker], rejudge=True)
    assert found.sound and found.trust.level == "repeated" and made.utility.immunized == 100


def test_a_checker_can_lie_as_a_publisher_can(published, key, tmp_path):
    checker = make_key(tmp_path / "checker.pem")
    recheck(published, tmp_path / "checker.pem")
    assert verify_folder(published, checker_keys=[checker]).trust.level == "repeated"
    shutil.rmtree(published / "rechecks")
    recheck(published, key[0])
    assert verify_folder(published, trusted_key=key[1], checker_keys=[key[1]]).trust.level == "signed"


def test_that_the_model_cannot_be_turned(published):
    certificate = Certificate.read(published / "certificate.json")
    assert certificate.not_run and certificate.statement.endswith("and for no others.")
    card = (published / "README.md").read_text(encoding="utf-8")
    assert "- Not run: " in card and "Attackers outside this list" in card


def test_that_nothing_changes_between_the_check_and_the_load(published):
    found = verify_folder(published)
    (published / "config.json").write_text("{}")
    assert found.ok and not verify_folder(published).ok, "what was found speaks of the files as they were"
