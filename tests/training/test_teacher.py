"""The teacher holds once what does not train, and answers in the student's precision."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState
from denoiser_builders import FAMILIES, build_denoiser, build_examples, build_scheduler
from torch import nn

from hf_immunize.training.core.teacher import Teacher
from hf_immunize.training.diffusion import DiffusionImmunizationConfig, DiffusionImmunizationTrainer


@pytest.fixture
def another_precision():
    """Accelerate keeps one precision per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_frozen_parameters_are_held_once_and_the_rest_stays_as_it_was():
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    student[0].requires_grad_(False)
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    teacher = Teacher(student)
    before = student.eval()(rows).detach().clone()
    shared = {id(p) for p in student.parameters()} & {id(p) for p in teacher.model.parameters()}
    assert shared == {id(p) for p in student[0].parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter += 1.0
    student.train()(rows)  # BatchNorm's statistics move as well
    with teacher.answering() as model:
        answer = model(rows.requires_grad_())
    assert torch.equal(answer, before) and not answer.requires_grad and not model.training
    assert [p.requires_grad for p in student.parameters()] == [False, False, True, True, True, True]


def first_distance(trainer, name: str = "distillation") -> float:
    """Distillation of the first step: student and teacher are one model."""
    trainer.train()
    history = getattr(trainer, "log_history", None) or trainer.state.log_history
    return next(row[name] for row in history if name in row)


def test_a_classifiers_teacher_runs_under_its_autocast(make_trainer, another_precision):
    trainer = make_trainer(bf16=True, feature_distillation=1.0, max_steps=1)
    assert trainer.accelerator.mixed_precision == "bf16"
    assert first_distance(trainer, "feature_distillation") == 0.0


@pytest.mark.parametrize("family", ["sdxl", "flux"])
@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_a_denoisers_teacher_runs_under_its_autocast_and_shares_what_is_frozen(
    tmp_path, another_precision, family, trainable
):
    assert family in FAMILIES
    model = build_denoiser(family)
    args = DiffusionImmunizationConfig(
        str(tmp_path), mixed_precision="bf16", distillation=1.0, trainable=trainable, max_steps=1, use_cpu=True,
        per_device_train_batch_size=4, per_device_harmful_batch_size=4, logging_steps=1, disable_progress=True,
    )
    trainer = DiffusionImmunizationTrainer(
        model, build_scheduler(family), args, train_dataset=build_examples(family, 8),
        harmful_dataset=build_examples(family, 8, seed=1, label=9),
    )
    mine = {id(p): p for p in trainer.bare.parameters()}
    own = [p for p in trainer.teacher.parameters() if id(p) not in mine]
    assert sum(p.numel() for p in own) == sum(p.numel() for p in mine.values() if p.requires_grad)
    assert first_distance(trainer) == 0.0
