"""A killed run continues bit for bit: every family, between any two steps, and a process killed by the system."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from denoiser_builders import build_denoiser, build_examples
from safetensors.torch import load_file

from hf_immunize.errors import RecordError
from hf_immunize.training.vision.checkpoints import last_complete_checkpoint

SCRIPT = Path(__file__).parent / "killed_diffusion.py"
WHOLE = {
    "objective": "condition_number+simulated_attack", "attacker_steps": 1, "distillation": 0.5, "ema_decay": 0.9,
    "max_steps": 5, "save_steps": 2, "save_total_limit": 2, "lr_scheduler_type": "cosine", "warmup_steps": 1,
    "logging_steps": 3, "eval_steps": 2, "max_loss_factor": 1.5, "gradient_accumulation_steps": 2,
}


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.bare.state_dict().items()}


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "at", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_resuming_after_a_kill_at_any_step_gives_the_unbroken_run(make_trainer, tmp_path, at):
    def run(folder, hook=None):
        model = build_denoiser("unet")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        return make_trainer(
            model=model, evaluation=build_examples("unet", 6, seed=5), output_dir=str(tmp_path / folder),
            before_update=hook, **WHOLE,
        )

    def kill(trainer):
        if trainer.step == at:
            raise Killed

    whole = run("whole")
    whole.train()
    with pytest.raises(Killed):
        run("killed", kill).train()
    resumed = run("killed")
    torch.manual_seed(99)  # nothing depends on the global generators
    resumed.train(last_complete_checkpoint(tmp_path / "killed"))
    assert equal(weights(resumed), weights(whole))
    assert resumed.log_history == whole.log_history and resumed.guard.history == whole.guard.history
    assert resumed.guard_record == whole.guard_record
    assert not equal(weights(whole), weights(run("fresh")))


def test_every_family_resumes_exactly(make_trainer, family, tmp_path):
    options = {"max_steps": 3, "save_steps": 2, "sites": "middle", "objective": "ill_only"}
    whole = make_trainer(family, **options)
    whole.train()
    resumed = make_trainer(family, **options)
    resumed.train(last_complete_checkpoint(tmp_path / "run"))
    assert len(resumed.log_history) == 3 and equal(weights(resumed), weights(whole))


@pytest.mark.slow
def test_a_process_killed_by_the_system_resumes_from_its_last_complete_checkpoint(tmp_path):
    def run(folder: str, kill_at: str = "") -> subprocess.CompletedProcess:
        words = [sys.executable, str(SCRIPT), str(tmp_path / folder), kill_at]
        paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        return subprocess.run(words, capture_output=True, text=True, env=environment)

    assert run("whole").returncode == 0
    # between two steps, and while the second checkpoint's first, second, … file is being written
    for place, kill_at in enumerate(("3", "write-0", "write-1", "write-2", "write-5")):
        folder = f"killed-{place}"
        assert run(folder, kill_at).returncode == -signal.SIGKILL
        assert Path(last_complete_checkpoint(tmp_path / folder)).name == "checkpoint-2", kill_at
        done = run(folder)
        assert done.returncode == 0, done.stderr
        assert equal(*(load_file(tmp_path / name / "final.safetensors") for name in ("whole", folder))), kill_at


def test_other_options_than_those_of_the_checkpoint_are_refused_but_a_run_may_be_made_longer(make_trainer, tmp_path):
    options = {"max_steps": 2, "save_steps": 2, "sites": "middle"}
    make_trainer(**options).train()
    last = tmp_path / "run" / "checkpoint-2"
    with pytest.raises(RecordError, match=r"strength=0.7 \(there 0.5\): resume from a checkpoint"):
        make_trainer(**options, strength=0.7).train(last)
    longer = make_trainer(**options | {"max_steps": 3, "logging_steps": 3, "eval_batch_size": 5})
    longer.train(last)
    whole = make_trainer(**options | {"max_steps": 3, "save_steps": 0})
    whole.train()
    assert equal(weights(longer), weights(whole))
    other = build_examples("unet", 12, seed=8, label=9)
    make_trainer(**options, harmful_eval_dataset=other).train(last)  # who had none may have some
    for change, message in (
        ({"evaluation": build_examples("unet", 6, seed=9)}, "eval_dataset="),
        ({"model": build_denoiser("unet", seed=3)}, "model="), ({"harmful": other}, "harmful_dataset=")
    ):
        with pytest.raises(RecordError, match=f"written with, got {message}"):
            make_trainer(**options, **change).train(last)
    held = {**options, "output_dir": str(tmp_path / "held")}
    make_trainer(**held, harmful_eval_dataset=other).train()
    with pytest.raises(RecordError, match="written with, got harmful_eval_dataset="):
        make_trainer(**held, harmful_eval_dataset=build_examples("unet", 12, seed=6, label=9)).train(
            tmp_path / "held" / "checkpoint-2"
        )
    bent = {**options, "lr_scheduler_type": "cosine", "output_dir": str(tmp_path / "bent")}
    make_trainer(**bent).train()
    with pytest.raises(RecordError, match=r"max_steps=3 \(there 2\)"):
        make_trainer(**bent | {"max_steps": 3}).train(tmp_path / "bent" / "checkpoint-2")


def test_checkpoints_of_an_earlier_longer_run_do_not_cost_the_new_ones(make_trainer, tmp_path):
    make_trainer(max_steps=6, save_steps=6, sites="middle").train()
    make_trainer(max_steps=4, save_steps=2, save_total_limit=1, sites="middle", seed=9).train()
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}


def test_a_checkpoint_that_is_not_whole_is_passed_over_or_refused(make_trainer, tmp_path):
    make_trainer(max_steps=2, save_steps=1, save_total_limit=2, sites="middle").train()
    last = tmp_path / "run" / "checkpoint-2"
    assert last_complete_checkpoint(tmp_path / "run") == str(last)
    (last / "optimizer.safetensors").unlink()
    with pytest.raises(RecordError, match="expected a whole checkpoint"):
        make_trainer(sites="middle").train(last)
    for name in ("model.safetensors", "immunization_state.safetensors"):
        whole = (last / name).read_bytes()
        (last / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(RecordError):
            make_trainer(max_steps=2, save_steps=1, save_total_limit=2, sites="middle").train(last)
        (last / name).write_bytes(whole)
    state = (last / "trainer_state.json").read_text(encoding="utf-8")
    for broken in ("[]", '{"options": null}', "{}"):
        (last / "trainer_state.json").write_text(broken, encoding="utf-8")
        with pytest.raises(RecordError, match="expected a whole checkpoint"):
            make_trainer(max_steps=2, save_steps=1, save_total_limit=2, sites="middle").train(last)
    (last / "trainer_state.json").write_text(state, encoding="utf-8")
    (last / "trainer_state.json").unlink()
    assert last_complete_checkpoint(tmp_path / "run").endswith("checkpoint-1")
