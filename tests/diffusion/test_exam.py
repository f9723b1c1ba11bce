"""The fixed exam: the same questions to every model, and a score that a slow loop confirms."""

from __future__ import annotations

import pytest
import torch
from denoiser_builders import build_denoiser, build_examples, build_scheduler

from hf_immunize.diffusion import DenoisingExam, LatentDataset, NoiseProcess, denoiser_of
from hf_immunize.errors import DataError


def test_the_same_model_gets_the_same_loss_and_its_mode_back(family):
    model, process = build_denoiser(family), NoiseProcess.from_scheduler(build_scheduler(family))
    model.train()
    exams = [DenoisingExam(process, build_examples(family), levels=2, seed=seed) for seed in (3, 3, 4)]
    first, second, other = (exam.ask(denoiser_of(model), model) for exam in exams)
    assert model.training
    assert torch.equal(first.losses_N, second.losses_N) and not torch.equal(first.losses_N, other.losses_N)


def test_the_score_is_that_of_a_loop_over_single_examples():
    model = build_denoiser("unet", dtype=torch.float64).eval()
    process, examples = NoiseProcess.from_scheduler(build_scheduler("unet")), build_examples("unet", 5)
    exam = DenoisingExam(process, examples, levels=3, seed=1)
    found = exam.ask(denoiser_of(model), model)
    total = energy = 0.0
    for question in range(15):
        row, level = question % 5, exam._levels[question]
        noise = exam._noise[question].double()
        assert question // 5 == int(level) * 3 // 1000
        s, n = process.signal_T[level], process.noise_T[level]
        label = examples.labels[row : row + 1]
        noisy = s * examples.latents[row].double() + n * noise
        answer = model(noisy[None], level, class_labels=label).sample[0].detach()
        total, energy = total + float((answer - noise).square().mean()), energy + float(noise.square().mean())
    assert found.loss == pytest.approx(total / 15, rel=1e-9)
    assert found.explained == pytest.approx(1 - total / energy, rel=1e-9)


def test_a_model_that_answers_zero_explains_nothing():
    model = build_denoiser("unet")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    process = NoiseProcess.from_scheduler(build_scheduler("unet"))
    assert DenoisingExam(process, build_examples("unet")).ask(denoiser_of(model), model).explained == 0.0


@pytest.mark.parametrize(
    "change,message",
    [
        ({"latents": torch.zeros(0, 1, 8, 8)}, "at least 1"),
        ({"latents": torch.full((2, 1, 8, 8), float("nan"))}, "finite latents"),
        ({"conditions": {"class_labels": torch.zeros(3).long()}}, "2 rows of every condition"),
        ({"labels": torch.tensor([0, 5])}, "labels in 0..1"),
    ],
)
def test_examples_that_cannot_be_used(change, message):
    good = {
        "latents": torch.zeros(2, 1, 8, 8), "conditions": {"class_labels": torch.tensor([0, 1])},
        "labels": torch.tensor([0, 1]), "label_names": ["a", "b"],
    }
    LatentDataset(**good)
    with pytest.raises(DataError, match=message):
        LatentDataset(**{**good, **change})


def test_fingerprints_tell_contents_apart():
    prints = [
        build_examples("sd", 4, seed=seed).fingerprint(source="x", role="y").sha256 for seed in (0, 0, 1)
    ]
    assert prints[0] == prints[1] != prints[2]
    changed = build_examples("sd", 4)
    changed.conditions["encoder_hidden_states"][0, 0, 0] += 1
    assert changed.fingerprint(source="x", role="y").sha256 != prints[0]
