"""W&B and Trackio by transformers' own report_to: spectra, terms, guard and probe arrive there as in TensorBoard.

The libraries themselves where they are installed (in an environment of their own: they ask for other versions of what
the project has), and in any case transformers' callbacks over a library that only takes notes.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from tracked_run import by_tag, train

TRACKERS = ["wandb", "trackio"]
TAGS = {"train/harmful_log_kappa", "train/primary_log_kappa", "train/harmful_adversary_r2", "train/primary_loss",
        "train/lambda/harmful_adversary_r2", "train/strength", "train/primary_drop", "train/harmful_probe"}


def check(held, before, after):
    """Spectra, terms and their weights, guard and probe, at the steps they belong to."""
    assert set(held) >= TAGS, TAGS - set(held)
    steps = {tag: sorted(int(step) for step in values) for tag, values in held.items()}
    assert steps["train/harmful_probe"] == [0, 3, 6] and steps["train/harmful_adversary_r2"] == [2, 4, 6]
    assert steps["train/primary_drop"] == [3, 6]
    probes = {int(step): value for step, value in held["train/harmful_probe"].items()}
    assert probes[0] == pytest.approx(before) and probes[6] == pytest.approx(after) and before != after


@pytest.mark.parametrize("tracker", TRACKERS)
def test_the_callback_hands_on_what_is_measured(tracker, tmp_path, monkeypatch):
    library = MagicMock(name=tracker, __version__="1.0")
    library.__spec__ = importlib.machinery.ModuleSpec(tracker, None)  # by which transformers asks whether it is there
    for name in (tracker, *(["wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"] if tracker == "wandb" else [])):
        monkeypatch.setitem(sys.modules, name, library)
    library.ConfigError = ValueError
    library.context_vars.current_space_id.get.return_value = None
    outcome = train(tracker, tmp_path).outcome
    check(by_tag([call.args[0] for call in library.log.call_args_list]), outcome.probe_before, outcome.probe_after)


@pytest.mark.parametrize("tracker", TRACKERS)
def test_the_library_itself_keeps_what_is_measured(tracker, tmp_path):
    pytest.importorskip(tracker, reason=f"{tracker} is not installed: pip install {tracker}, in another environment")
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "t"),
                                "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("tracked_run.py")
    done = subprocess.run([sys.executable, str(script), tracker, str(tmp_path)], capture_output=True, text=True,
                          env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    check(told["held"], told["before"], told["after"])
