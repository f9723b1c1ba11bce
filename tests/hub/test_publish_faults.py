"""Whatever the Hub does: a complete publication or none, a clear message, and a second attempt that succeeds."""

import functools
import multiprocessing
import os
import signal
import sys

import pytest
from loopback import UPLOAD, Fault
from published import certified, client, publish_in_child, write_release

from hf_immunize.errors import HubError, PublishRefusedError
from hf_immunize.hub import publish, verify_folder, verify_model
from hf_immunize.hub.release import prepare

STATUSES = ("401", "403", "404", "409", "412", "429", "500", "503")
ADVICE = {
    "401": "HTTP 401", "403": "HTTP 403 ", "404": "HTTP 404", "409": "HTTP 409", "412": "HTTP 412",
    "429": "too many requests: wait 7 seconds", "500": "HTTP 500", "503": "HTTP 503",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return certified(tmp_path_factory.mktemp("faults"))


@pytest.fixture(autouse=True)
def gate_passed_once(monkeypatch):
    """The gate is not what these tests are about: its outcome for the same folder is kept. Killed processes run it."""
    monkeypatch.setattr(sys.modules["hf_immunize.hub.publishing"], "prepare", prepared)


@functools.cache
def prepared(folder, **gate):
    return prepare(folder, **gate)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Content by name of the complete publication, which verifies."""
    root = write_release(folder, tmp_path_factory.mktemp("whole"))
    assert verify_folder(root).ok
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def complete_or_none(hub, whole):
    """True when the head holds every byte of the release, False when it holds none of its files; else an error."""
    held = dict(hub.head("me/model").files) if "me/model" in hub.repositories else {}
    held.pop(".gitattributes", None)
    assert not held or held == whole, "a half-published revision"
    return bool(held)


def second_attempt(hub, folder, whole):
    hub.faults, hub.on_request = [], None
    assert publish(folder, "me/model", api=client(hub)).confirmed
    assert complete_or_none(hub, whole)


@pytest.mark.parametrize("endpoint", UPLOAD)
@pytest.mark.parametrize("status", STATUSES)
def test_statuses_at_every_endpoint(hub, folder, whole, endpoint, status):
    body = f'{{"error": "injected", "url": "{hub.url}/me/model"}}'
    hub.faults = [Fault(endpoint, status, headers={"Retry-After": "7"}, body=body)]
    try:
        publish(folder, "me/model", api=client(hub))
    except HubError as error:
        assert str(error).startswith("expected the Hub to ") and "Traceback" not in str(error)
        wanted = ADVICE[status] if (endpoint, status) != ("create", "409") else "HTTP 404"
        assert wanted in str(error)
    else:
        raise AssertionError("the fault went unnoticed")
    assert not complete_or_none(hub, whole)
    second_attempt(hub, folder, whole)


@pytest.mark.parametrize("endpoint", UPLOAD)
@pytest.mark.parametrize("kind", ["cut", "cut-after", "hang"])
def test_connections_that_break(hub, folder, whole, endpoint, kind):
    hub.hang = 0.4
    hub.faults = [Fault(endpoint, kind)]
    try:  # only silence needs a short limit; a slow machine must not be taken for a broken connection
        done = publish(folder, "me/model", api=client(hub), timeout=0.15 if kind == "hang" else 60.0)
    except HubError as error:
        assert "the Hub has trouble or cannot be reached: try again later" in str(error)
        assert not complete_or_none(hub, whole)
    else:  # the answer to the commit was lost, not the commit
        assert (endpoint, kind) == ("commit", "cut-after") and done.confirmed
        assert done.revision == hub.head("me/model").oid and complete_or_none(hub, whole)
    second_attempt(hub, folder, whole)


def test_silence_is_not_waited_for(hub, folder, whole):
    hub.hang = 300.0  # far longer than any machine is slow: who waits for it gets a reset, not a time-out
    hub.faults = [Fault("commit", "hang")]
    with pytest.raises(HubError, match="ReadTimeout"):
        publish(folder, "me/model", api=client(hub), timeout=2.0)
    assert "commit" in hub.requests and not complete_or_none(hub, whole)
    second_attempt(hub, folder, whole)


@pytest.mark.parametrize("endpoint", UPLOAD)
def test_a_slow_drip_is_waited_for(hub, folder, whole, endpoint):
    hub.faults = [Fault(endpoint, "drip")]
    assert publish(folder, "me/model", api=client(hub), timeout=60.0).confirmed
    second_attempt(hub, folder, whole)


@pytest.mark.parametrize("endpoint", ["preupload", "batch", "put"])
@pytest.mark.parametrize("kind", ["429", "503", "cut"])
def test_passing_trouble_is_retried_by_the_client(hub, folder, endpoint, kind):
    hub.faults = [Fault(endpoint, kind, times=2, headers={"Retry-After": "7"})]
    assert publish(folder, "me/model", api=client(hub)).confirmed
    assert hub.requests.count(endpoint) == 3
    assert hub.waits == ([1, 2] if kind == "cut" else [8.0, 8.0])


def test_a_commit_that_cannot_be_read_back_stands_unconfirmed(hub, folder, whole):
    hub.faults = [Fault("tree", "500")]
    done = publish(folder, "me/model", api=client(hub))
    assert not done.confirmed and done.revision == hub.head("me/model").oid and complete_or_none(hub, whole)


def test_a_pull_request_whose_answer_was_lost_is_not_called_unpublished(hub, folder):
    hub.put_revision("me/model", {".gitattributes": b""})
    hub.faults = [Fault("commit", "cut-after")]
    with pytest.raises(HubError, match="A pull request may have been opened: look before you try again"):
        publish(folder, "me/model", api=client(hub), create_pr=True)


def test_a_hub_that_is_not_there(folder, hub):
    from huggingface_hub import HfApi

    with pytest.raises(HubError, match="cannot be reached: try again later"):
        publish(folder, "me/model", api=HfApi(endpoint="http://127.0.0.1:9", token="none"), timeout=1.0)


@pytest.mark.parametrize("endpoint", ["info", "tree", "resolve"])
@pytest.mark.parametrize("kind", ["401", "404", "500", "503", "cut"])
def test_downloads_that_fail_are_never_verified(hub, folder, tmp_path, endpoint, kind):
    publish(folder, "me/model", api=client(hub))
    hub.faults = [Fault(endpoint, kind)]
    with pytest.raises(HubError, match="expected the Hub to (describe the repository|send the files)"):
        verify_model("me/model", api=client(hub), cache_dir=tmp_path / "cache")


@pytest.fixture(scope="module")
def spawner():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_immunize.hub", "huggingface_hub.hf_api"])
    return context


def kill_at(hub, folder, spawner, at, phase):
    """Publish in a process that is killed at its ``at``-th request; the requests it made."""
    child = spawner.Process(target=publish_in_child, args=(str(folder), hub.url))

    def strike(number, name, now):
        if (number, now) == (at, phase):
            os.kill(child.pid, signal.SIGKILL)

    hub.on_request = strike
    child.start()
    child.join(300)
    hub.on_request = None
    return child.exitcode


@pytest.mark.parametrize("phase", ["before", "after"])
@pytest.mark.parametrize(
    "at", [at if at in (1, 4, 7) else pytest.param(at, marks=pytest.mark.slow) for at in range(1, 8)]
)
def test_kill_during_upload(hub, folder, whole, spawner, at, phase):
    assert kill_at(hub, folder, spawner, at, phase) == -signal.SIGKILL
    names = ["create", "info", "validate", "preupload", "batch", "put", "commit"]
    assert hub.requests[:at] == names[:at]
    assert not complete_or_none(hub, whole) or names[at - 1] == "commit"
    second_attempt(hub, folder, whole)


def test_weights_that_are_no_numbers_do_not_go_out(tmp_path):
    from models import certify, save_vit
    from safetensors.torch import load_file, save_file

    base, model = save_vit(tmp_path / "base", 0), save_vit(tmp_path / "model", 1)
    weights = load_file(model / "model.safetensors")
    weights["classifier.bias"][1] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    certify(model, base, "tiny", "ViTForImageClassification")
    with pytest.raises(PublishRefusedError, match=r"got NaN or infinity in 1 tensors \(classifier.bias"):
        prepared(model)
