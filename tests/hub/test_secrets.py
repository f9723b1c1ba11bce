"""The token is nowhere: not in output, logs, tracebacks, records, the card, nor on the Hub's disk."""

import logging
import os
import subprocess
import sys
import traceback

import pytest
from loopback import UPLOAD, Fault
from published import TOKEN, certified, client

from hf_immunize.errors import HubError
from hf_immunize.hub import publish, verify_model

ECHO = {"X-Error-Message": f"bad token {TOKEN}", "X-Error-Code": ""}


def everything_below(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_the_client_does_send_it(hub, tmp_path):
    publish(certified(tmp_path), "me/model", api=client(hub))
    assert TOKEN in hub.tokens, "the other tests of this file would pass without a token"


@pytest.mark.parametrize("endpoint", UPLOAD)
@pytest.mark.parametrize("status", ["400", "500"])
def test_a_hub_that_echoes_the_token(hub, tmp_path, endpoint, status, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    hub.faults = [Fault(endpoint, status, headers=ECHO, body=f'{{"error": "token {TOKEN} is bad"}}')]
    with pytest.raises(HubError) as caught:
        publish(certified(tmp_path), "me/model", api=client(hub))
    told = "".join(traceback.format_exception(caught.value)) + str(caught.value)
    assert TOKEN not in told and caught.value.__context__ is None and caught.value.__cause__ is None
    captured = capfd.readouterr()
    assert TOKEN not in captured.out + captured.err + caplog.text
    assert TOKEN.encode() not in everything_below(tmp_path)


def test_it_is_not_in_what_was_published_or_downloaded(hub, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    publish(certified(tmp_path), "me/model", api=client(hub))
    verify_model("me/model", api=client(hub), cache_dir=tmp_path / "cache")
    captured = capfd.readouterr()
    assert TOKEN not in captured.out + captured.err + caplog.text
    held = b"".join(data for revision in hub.repositories["me/model"].revisions.values()
                    for data in revision.files.values())
    assert TOKEN.encode() not in held + everything_below(tmp_path)


@pytest.mark.parametrize("arguments", [["publish"], ["--debug", "publish"]])
def test_the_command_line_with_every_log_turned_on(hub, tmp_path, arguments):
    folder = certified(tmp_path)
    hub.faults = [Fault("commit", "500", headers=ECHO, body=TOKEN)]
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_DEBUG": "1",
        "HF_HUB_VERBOSITY": "debug", "HF_HOME": str(tmp_path / "home"),
    }
    (tmp_path / "policy.yaml").write_text("start_from: research\nrejudged: false")
    policy = ["--policy", str(tmp_path / "policy.yaml")]
    done = subprocess.run([sys.executable, "-m", "hf_immunize.cli", *arguments, str(folder), "me/model", *policy],
                          env=environment, capture_output=True, text=True, timeout=120)
    assert "HTTP 500" in done.stderr and TOKEN not in done.stdout + done.stderr
    assert ("Traceback" in done.stderr) == ("--debug" in arguments)
    assert "curl" in done.stderr, "the logs are not as loud as this test thinks"
    assert TOKEN.encode() not in everything_below(tmp_path)
    assert done.returncode == (1 if "--debug" in arguments else 5)
