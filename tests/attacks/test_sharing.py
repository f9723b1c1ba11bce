"""Several processes and one exam: every run once, whoever dies, with the traces that one process leaves."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import launching
import pytest
import torch
from transformers import ViTImageProcessorPil

from hf_immunize.attacks import ATTACKS, run_suite
from hf_immunize.attacks.core.sharing import Claims, Share, leave_group
from hf_immunize.errors import ConfigError
from hf_immunize.records import AttackTrace

SETTINGS = {
    "linear_probe_gd": {"steps": (400,), "learning_rate": (1.0, 4.0)},
    "ridge_probe": {"penalty": (1e-3, 1e-6), "features": ("centered",)},
    "full_finetune": {"steps": (6,)},
    "lora": {"steps": (6,)},
}
SEEDS = (0, 1, 2)
RUNS = 3 * 2 + 3 * 2 + 2 * (3 + 2)
FORK = multiprocessing.get_context("fork")


def sit(context, folder, share=None, told=None, **options):
    torch.set_num_threads(1)
    summary = run_suite(
        context, ATTACKS, list(SETTINGS), SEEDS, folder, SETTINGS, trials=3, tuning_seeds=1, share=share, **options
    )
    if told is not None:
        told.put((summary.made, summary.kept))
    return summary


def curves(folder):
    return {path.name: AttackTrace.read(path).curve for path in folder.glob("traces/control/*.json")}


def start(context, folder, size):
    told = FORK.Queue()
    workers = [FORK.Process(target=sit, args=(context, folder, Share(rank, size), told)) for rank in range(size)]
    for worker in workers:
        worker.start()
    return workers, told


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The curves that one process leaves, once for this file."""
    return {}


@pytest.fixture
def alone(make_context, tmp_path, one):
    if not one:
        assert sit(make_context(), tmp_path / "alone").made == RUNS
        one.update(curves(tmp_path / "alone"))
        assert not (tmp_path / "alone" / ".running").exists(), "locks are cleared away"
    return one


def test_four_processes_make_every_run_once_and_leave_what_one_leaves(make_context, tmp_path, alone):
    workers, told = start(make_context(), tmp_path / "shared", 4)
    found = [told.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(made for made, _ in found) == RUNS and {made + kept for made, kept in found} == {RUNS}
    assert curves(tmp_path / "shared") == alone


@pytest.mark.slow
def test_whoever_is_killed_others_finish_his_runs(make_context, tmp_path, alone):
    workers, told = start(make_context(), tmp_path / "shared", 3)
    until = time.monotonic() + 60
    while not list((tmp_path / "shared").glob("traces/control/*.json")) and time.monotonic() < until:
        time.sleep(0.002)
    for worker in workers[:2]:
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(0.1)
    workers[2].join(120)
    assert [worker.join() or worker.exitcode for worker in workers] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert curves(tmp_path / "shared") == alone
    assert sum(told.get(timeout=5)) == RUNS


@pytest.mark.slow
def test_parts_that_cannot_see_each_other_make_each_its_own_and_the_finals_come_last(make_context, tmp_path, alone):
    context, folder = make_context(), tmp_path / "parts"
    tuned = RUNS - 2 * 2
    first = [sit(context, folder, Share().with_part(f"{part}/3")) for part in (1, 2, 3)]
    assert [summary.waiting > 0 for summary in first] == [True, True, False]
    assert sum(summary.made for summary in first[:2]) < tuned
    last = [sit(context, folder, Share().with_part(f"{part}/3")) for part in (1, 2, 3)]
    assert sum(summary.made for summary in (*first, *last)) == RUNS and not any(summary.waiting for summary in last)
    assert curves(folder) == alone


def test_runs_are_not_replaced_by_many_at_once(make_context, tmp_path):
    for share in (Share(size=2), Share(parts=2)):
        with pytest.raises(ConfigError, match="one process and no shard with overwrite"):
            sit(make_context(), tmp_path, share, overwrite=True)


def test_a_job_is_held_by_one_and_free_when_he_is_gone(tmp_path):
    held, other = Claims(tmp_path / "locks"), Claims(tmp_path / "locks")
    with held.take("a") as mine, other.take("a") as his, other.take("b") as free:
        assert (mine, his, free) == (True, False, True)
    with other.take("a") as mine:
        assert mine
    child = FORK.Process(target=_hold, args=(tmp_path / "locks",))
    child.start()
    while not (tmp_path / "locks" / "held").exists():
        time.sleep(0.01)
    with held.take("c") as mine:
        assert not mine
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    with held.take("c") as mine:
        assert mine


def _hold(folder):
    with Claims(folder).take("c"):
        (folder / "held").touch()
        time.sleep(60)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2", "1/0"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="expected shard as i/n"):
        Share().with_part(text)


@pytest.mark.parametrize("shown,seen", [("4,6", "6"), ("3", "3"), (None, "1"), ("", "")])
def test_a_process_of_a_launcher_is_on_its_own_with_one_gpu(monkeypatch, shown, seen):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name in list(os.environ):
        if name.startswith(("TORCHELASTIC", "FSDP", "ACCELERATE", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)
    told = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x",
            "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert leave_group() == Share(5, 8)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == seen
    assert not set(told) - {"ACCELERATE_USE_CPU"} & set(os.environ)
    assert leave_group() == Share()


@pytest.mark.slow
def test_the_stage_shares_its_runs_under_the_launcher(tmp_path, make_vit):
    make_vit(labels=5).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    words = ["--config", str(launching.ROOT / "tests" / "digits.yaml"), "--model_path", str(tmp_path / "model"),
             "--role", "control", "--attacks", "linear_probe_gd", "ridge_probe", "full_finetune", "--seeds", "0", "1",
             "--settings", "linear_probe_gd.steps=30", "full_finetune.steps=2", "--device", "cpu"]  # fmt: skip
    script = launching.ROOT / "recipes" / "attack.py"
    for config, folder in (("cpu-2", "two"), ("", "one")):
        launching.run_script(script, *words, "--output_path", str(tmp_path / folder), config=config)
    assert curves(tmp_path / "two") == curves(tmp_path / "one") and len(curves(tmp_path / "one")) > 10
