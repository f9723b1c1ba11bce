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
from published import TOKEN  # noqa: E402


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
