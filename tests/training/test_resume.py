"""A run that was killed continues bit for bit; checkpoints are loaded strictly; incomplete ones are passed over."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import TrainerCallback

from hf_immunize.errors import RecordError
from hf_immunize.training.vision.checkpoints import last_complete_checkpoint


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step: int, event: str):
        self.step, self.event = step, event

    def __getattribute__(self, name):
        if name.startswith("on_"):
            step, event = object.__getattribute__(self, "step"), object.__getattribute__(self, "event")

            def handler(args, state, control, **kwargs):
                if name == event and state.global_step == step:
                    raise Killed

            return handler
        return object.__getattribute__(self, name)


OPTIONS = {
    "max_steps": 7,
    "save_strategy": "steps",
    "save_steps": 2,
    "objective": "condition_number+closed_form_adversary",
    "distillation": 1.0,
    "max_primary_drop": 5.0,
    "eval_strategy": "steps",
    "eval_steps": 3,
}


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resuming_after_a_kill_at_any_step_gives_the_unbroken_weights(
    make_trainer, make_vit, make_pixels, tmp_path, accumulation
):
    def run(name, callbacks=None, resume=None):
        return make_trainer(
            model=make_vit(dropout=0.2),
            evaluation=make_pixels(12, seed=3),
            callbacks=callbacks,
            output_dir=str(tmp_path / name),
            gradient_accumulation_steps=accumulation,
            **OPTIONS,
        )

    unbroken = run("unbroken")
    unbroken.train()
    truth = weights(unbroken)
    for step, event in [(2, "on_step_end"), (3, "on_step_begin"), (4, "on_save"), (5, "on_pre_optimizer_step")]:
        folder = tmp_path / f"killed-{step}"
        with pytest.raises(Killed):
            run(folder.name, [KillAt(step, event)]).train()
        resumed = run(folder.name)
        resumed.train(resume_from_checkpoint=last_complete_checkpoint(folder))
        assert equal(weights(resumed), truth), (step, event)
        assert resumed.guard.history == unbroken.guard.history
        assert not equal(truth, weights(run("fresh")))


def test_a_process_killed_by_the_system_resumes_from_its_last_complete_checkpoint(tmp_path):
    script = Path(__file__).parent / "killed_run.py"

    def run(folder: str, kill_at: int = 0) -> subprocess.CompletedProcess:
        words = [sys.executable, str(script), str(tmp_path / folder), str(kill_at)]
        return subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert run("whole").returncode == 0
    assert run("killed", kill_at=3).returncode == -signal.SIGKILL
    assert last_complete_checkpoint(tmp_path / "killed") is not None
    done = run("killed")
    assert done.returncode == 0, done.stderr
    whole, killed = (load_file(tmp_path / name / "final.safetensors") for name in ("whole", "killed"))
    assert equal(whole, killed)


def test_an_incomplete_checkpoint_is_passed_over(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")
    (folder / "checkpoint-4" / "trainer_state.json").write_text('{"trunc')
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_no_room_for_a_checkpoint_is_told_and_the_last_whole_one_stays(make_trainer, monkeypatch):
    """As a limit of file sizes says it."""
    trainer, stock = make_trainer(max_steps=4, save_strategy="steps", save_steps=2), PreTrainedModel.save_pretrained

    def save(self, folder, *args, **kwargs):
        if str(folder).endswith("checkpoint-4"):
            raise SafetensorError("I/O error: File too large (os error 27)")
        return stock(self, folder, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    with pytest.raises(RecordError, match=r"expected to write the weights to .*checkpoint-4, got I/O error: File too"):
        trainer.train()
    assert last_complete_checkpoint(trainer.args.output_dir).endswith("checkpoint-2")


def test_a_checkpoint_without_our_state_says_so(make_trainer):
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-1"
    (checkpoint / "immunization_state.json").unlink()
    with pytest.raises(RecordError, match="expected immunization_state.safetensors and immunization_state.json"):
        make_trainer(max_steps=2).train(resume_from_checkpoint=str(checkpoint))


def test_a_tensor_missing_from_a_checkpoint_is_an_error_or_restored_never_left_random(make_trainer, make_vit, tmp_path):
    """The stock Trainer loads non-strictly, and keeps whatever it had for names that moved between releases."""
    trained = make_trainer(max_steps=2, save_strategy="steps", save_steps=2, learning_rate=1e-2)
    trained.train()
    checkpoint = Path(trained.args.output_dir) / "checkpoint-2"
    expected = weights(trained)

    fresh = make_trainer(model=make_vit(seed=9))
    fresh._load_from_checkpoint(str(checkpoint))
    assert equal(weights(fresh), expected)

    stock = make_trainer(model=make_vit(seed=9))
    Trainer._load_from_checkpoint(stock, str(checkpoint))
    stale = [name for name, value in weights(stock).items() if not torch.equal(value, expected[name])]
    assert stale, "the stock loader got it right: the cure can go"


def test_the_best_model_is_loaded_strictly_too(make_trainer, make_vit, tmp_path):
    trainer = make_trainer(model=make_vit(seed=9))
    other = make_vit(seed=3)
    other.save_pretrained(tmp_path / "best")
    trainer.state.best_model_checkpoint = str(tmp_path / "best")
    trainer._load_best_model()
    assert equal(weights(trainer), dict(other.state_dict()))


def test_no_pickle_is_left_in_a_saved_model(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
    shutil.rmtree(tmp_path / "model")


