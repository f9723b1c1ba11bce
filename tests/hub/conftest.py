"""Makes the builders and the loopback Hub importable here, and starts one Hub per test."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402
from loopback import Loopback  # noqa: E402
from published import SMALL_EXAM, TOKEN  # noqa: E402


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    waits: list[float] = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=waits.append))
    with Loopback(token=TOKEN) as server:
        server.waits = waits  # what the client's own retries would have slept
        yield server


@pytest.fixture(autouse=True)
def no_key_of_the_developer(monkeypatch, tmp_path_factory):
    """``publish`` signs with the user's key where there is one; tests make their own."""
    monkeypatch.delenv("HF_IMMUNIZE_SIGNING_KEY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))


@pytest.fixture(autouse=True)
def gate_for_small_exams(request, monkeypatch):
    """The gate's default asks for the standard exam, which synthetic folders have not sat; test_policy.py leaves it."""
    from hf_immunize.hub import release
    from hf_immunize.hub.policy import Policy

    if request.module.__name__ != "test_policy":
        monkeypatch.setattr(release, "PUBLISHING", Policy(**SMALL_EXAM))
