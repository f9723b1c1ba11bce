"""Training at sites that hold several windows per image, or channels last: every use pairs a label with its image."""

from __future__ import annotations

import logging

import pytest
import torch
from test_gradients import relative_error
from torch import Tensor, nn
from torch.nn import functional
from vision_builders import ARCHITECTURES, build_classifier, image_size

from hf_immunize.attacks import AttackContext
from hf_immunize.attacks.vision._blocks import block_sites
from hf_immunize.data import StepBatchSampler, fingerprint
from hf_immunize.errors import ConfigError, ModelError
from hf_immunize.features import capture_inputs
from hf_immunize.regularizers import closed_form_adversary
from hf_immunize.training.vision.record import training_spectra
from hf_immunize.training.vision.sites import choose_sites

WINDOWS = "swin.encoder.layers.1.blocks.0.attention.q_proj"
"""Swin's last block reads 4 windows of 4 tokens per image here."""
SITES = {
    "swin": [f"swin.encoder.layers.{place}.attention.q_proj" for place in ("0.blocks.0", "0.blocks.1", "1.blocks.0")],
    "convnext": [f"convnext.encoder.stages.{stage}.layers.{block}.pwconv{layer}"
                 for stage, block in ((0, 0), (1, 0), (1, 1)) for layer in (1, 2)],
}  # fmt: skip


@pytest.fixture(autouse=True)
def smaller_windows(monkeypatch):
    """Two stages of 2×2 windows, so that both have several."""
    monkeypatch.setitem(ARCHITECTURES, "swin", ARCHITECTURES["swin"] | {"window_size": 2})


def by_image(model: nn.Module, sites: list[str], pixels: Tensor) -> dict[str, Tensor]:
    """Everything a linear layer reads, cut into one block per image, averaged."""
    with capture_inputs(model, sites) as caught:
        model(pixel_values=pixels)
    return {site: caught.raw(site).unflatten(0, (len(pixels), -1)).flatten(1, -2).mean(1) for site in sites}


def splits(make_pixels, name: str, dtype=torch.float64):
    size = image_size(name)
    return [make_pixels(rows, seed=seed, dtype=dtype, size=size) for seed, rows in enumerate((24, 30))]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True},
                                     {"cache_frozen_features": True}], ids=["plain", "accumulated", "checkpointed",
                                                                            "cached"])  # fmt: skip
@pytest.mark.parametrize("name", SITES)
def test_the_gradient_is_that_of_one_row_per_image(make_trainer, make_pixels, keep_gradients, tmp_path, name, options):
    if name == "convnext" and "gradient_checkpointing" in options:
        pytest.skip("transformers has no activation checkpointing for ConvNeXt")
    primary, harmful = splits(make_pixels, name)
    model, truth_model, sites = *(build_classifier(name, dtype=torch.float64) for _ in range(2)), SITES[name]
    trained = None
    if "cache_frozen_features" in options:
        trained, sites = "last:1", sites[-1:]
        options = options | {"feature_cache_dir": str(tmp_path / "cache")}
    accumulation = options.get("gradient_accumulation_steps", 1)
    make_trainer(
        model=model, primary=primary, harmful=harmful, callbacks=[keep_gradients], objective="closed_form_adversary",
        horizon="100", memorization=1.0, weight="1", strength=1.0, max_steps=1,
        sites="lora" if trained is None else sites[0],
        per_device_train_batch_size=24 // accumulation, max_grad_norm=0.0, data_seed=5, trainable_modules=trained,
        **options,
    ).train()  # fmt: skip
    sampler = StepBatchSampler(harmful.labels.tolist(), 12 * accumulation, seed=5)
    rows = sampler.global_batch(0)
    loss = functional.cross_entropy(truth_model(primary.pixel_values).logits, primary.labels)
    for features in by_image(truth_model, sites, harmful.pixel_values[rows]).values():
        term = closed_form_adversary(features, harmful.labels[rows], horizon=100.0, memorization=1.0)
        loss = loss + term / len(sites)
    loss.backward()
    truth = {name: p.grad for name, p in truth_model.named_parameters() if p.grad is not None}
    found = keep_gradients.steps[0]
    assert found and relative_error(found, {name: truth[name] for name in found}) < 1e-9


def test_the_reference_is_the_gradient_of_a_shift_of_all_windows_of_an_image(make_trainer, make_pixels):
    primary, harmful = splits(make_pixels, "swin")
    trainer = make_trainer(
        model=build_classifier("swin", dtype=torch.float64), primary=primary, harmful=harmful, sites=WINDOWS,
        per_device_train_batch_size=24,
    )  # fmt: skip
    trainer._measure_references()
    model = build_classifier("swin", dtype=torch.float64)
    shift = torch.zeros(24, 16, dtype=torch.float64, requires_grad=True)
    attention = WINDOWS.removesuffix(".q_proj")  # keys and values read the same tensor
    model.get_submodule(attention).register_forward_pre_hook(
        lambda _, args: (args[0] + shift.repeat_interleave(len(args[0]) // 24, 0)[:, None], *args[1:])
    )
    functional.cross_entropy(model(primary.pixel_values).logits, (primary.labels + 1) % 3).backward()
    (weights,) = trainer.objective.weights.values()
    assert float(weights.reference) == pytest.approx(float(shift.grad.norm()), rel=1e-9)


def test_distillation_and_spectra_at_a_site_with_windows_count_images(make_trainer, make_pixels):
    primary, harmful = splits(make_pixels, "swin")
    trainer = make_trainer(
        model=build_classifier("swin", dtype=torch.float64), primary=primary, harmful=harmful, feature_module=WINDOWS,
        sites="head", feature_distillation=1.0, max_steps=2, per_device_train_batch_size=24, learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    model = build_classifier("swin", dtype=torch.float64)
    start = by_image(model, [WINDOWS], primary.pixel_values)[WINDOWS]
    logged = [entry["feature_distillation"] for entry in trainer.state.log_history if "feature_distillation" in entry]
    assert logged[0] < 1e-30
    assert 0 < logged[1] < 1
    spectra = {record.task: record for record in training_spectra(trainer)}
    assert {task: record.rows for task, record in spectra.items()} == {"primary": 24, "harmful": 30}
    end = by_image(trainer.model.eval(), [WINDOWS], primary.pixel_values)[WINDOWS]
    centred = torch.linalg.svdvals(end - end.mean(0)).square() / 24
    assert max(spectra["primary"].eigenvalues) == pytest.approx(float(centred[0]), rel=1e-9)
    assert not torch.allclose(start, end)


def test_the_preconditioner_sees_every_position_of_every_window(make_trainer, make_pixels):
    """K of Algorithm 1 is a moment of what the layer multiplies, whatever image it is of."""
    primary, harmful = splits(make_pixels, "swin")
    trainer = make_trainer(
        model=build_classifier("swin", dtype=torch.float64), primary=primary, harmful=harmful,
        precondition_gradients=WINDOWS, precondition_ridge=0.0,
    )  # fmt: skip
    with torch.no_grad(), capture_inputs(trainer.model, [WINDOWS]) as caught:
        trainer.model.eval()(pixel_values=primary.pixel_values)
    inverse, scale = trainer.preconditioner.inverses({WINDOWS: [caught.raw(WINDOWS)]})[WINDOWS]
    every = []
    for image in primary.pixel_values:
        with torch.no_grad(), capture_inputs(trainer.model, [WINDOWS]) as caught:
            trainer.model(pixel_values=image[None])
        every.append(caught.raw(WINDOWS).reshape(-1, 16))
    moment = torch.stack([rows.T @ rows for rows in every]).sum(0) / sum(len(rows) for rows in every)
    assert scale == pytest.approx(float(moment.diagonal().mean()))
    probe = torch.randn(16, 2, dtype=torch.float64)
    assert torch.allclose(inverse.apply(moment @ probe), probe, atol=1e-6)


def test_imma_with_lora_learns_on_windows(make_trainer, make_pixels):
    """The attacker's factors sit on the projections that read windows; its own loss falls."""
    primary, harmful = splits(make_pixels, "swin", torch.float32)
    trainer = make_trainer(
        model=build_classifier("swin"), primary=primary, harmful=harmful, objective="imma", attacker_lora_rank=2,
        attacker_lora_rate=1e-2, max_steps=6, learning_rate=0.0,
    )  # fmt: skip
    trainer.train()
    assert len(trainer.attacker.factors) == 6
    assert all(bool(up.any()) for _, up in trainer.attacker.factors.values())


def test_a_layout_of_the_users_is_what_is_trained_on(make_trainer, make_vit, make_pixels, keep_gradients):
    primary, harmful = (make_pixels(24, seed=seed, dtype=torch.float64) for seed in (0, 1))
    site = "vit.layers.1.mlp.fc1"
    make_trainer(
        model=make_vit(dtype=torch.float64), primary=primary, harmful=harmful, callbacks=[keep_gradients],
        objective="ill_only", weight="1", strength=1.0, sites=site, site_layouts="fc1=n 0 d", max_steps=1,
        per_device_train_batch_size=24, per_device_harmful_batch_size=24, max_grad_norm=0.0,
    ).train()  # fmt: skip
    from hf_immunize.linalg import second_moment_spectrum
    from hf_immunize.regularizers import ill_conditioned

    model = make_vit(dtype=torch.float64)
    loss = functional.cross_entropy(model(primary.pixel_values).logits, primary.labels)
    with capture_inputs(model, [site]) as caught:
        model(harmful.pixel_values)
    (loss + ill_conditioned(second_moment_spectrum(caught.raw(site)[:, 0]))).backward()
    truth = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_error(keep_gradients.steps[0], truth) < 1e-9


def test_sites_and_layouts_that_cannot_be_are_refused_before_training(make_trainer, make_pixels):
    primary, harmful = splits(make_pixels, "swinv2", torch.float32)

    def build(**options):
        return make_trainer(model=build_classifier("swinv2"), primary=primary, harmful=harmful, **options)

    table = "swinv2.encoder.layers.0.blocks.0.attention.self.continuous_position_bias_mlp.0"
    with pytest.raises(ModelError, match=rf"at '{table}' \(Linear\), got an input of shape \(1, 7, 7, 2\)"):
        build(sites=table)
    query = "swinv2.encoder.layers.0.blocks.0.attention.self.query"
    with pytest.raises(ModelError, match=r"\(12, 16, 8\) for 3 images, of which '\(k n\) t d' does not keep"):
        build(sites=query, site_layouts="query=(k n) t d")
    with pytest.raises(ConfigError, match="expected site_layouts like"):
        build(sites=query, site_layouts="key=n t d")


def test_layers_that_no_image_changes_are_left_out_of_the_preset_and_said(caplog):
    from transformers.utils import logging as library

    model = build_classifier("perceiver")
    library.enable_propagation()
    with caplog.at_level(logging.WARNING):
        sites = choose_sites(model, "lora", None, "perceiver.decoder.decoder.final_layer", torch.randn(3, 16, 16))
    assert "2 of 8 layers are left out of the sites, since no image changes their inputs" in caplog.text
    assert len(sites) == 4 and sum(sites.values()) == pytest.approx(1)
    with pytest.raises(ModelError, match="expected sites that every forward passes once"):
        choose_sites(build_classifier("siglip"), "out_proj,attention.out_proj", None, None, torch.randn(3, 16, 16))


@pytest.mark.parametrize("name", ["swin", "convnext", "mobilenet_v2", "pvt", "poolformer", "focalnet"])
def test_attackers_see_one_row_per_image_after_every_block(make_pixels, tmp_path, name):
    build_classifier(name).save_pretrained(tmp_path / "model")
    parts = [make_pixels(rows, seed=rows, size=image_size(name)) for rows in (12, 6, 9)]
    prints = tuple(fingerprint(part, source="blobs", role=str(place)) for place, part in enumerate(parts))
    context = AttackContext(tmp_path / "model", "subject", *parts, prints)
    for site in block_sites(context.model(0), context.head):
        features = context.features_of(context.model(0), site)
        assert {split: len(rows) for split, rows in features.items()} == {"attack": 12, "validation": 6, "test": 9}
        alone = context.features_of(context.model(0), site)["test"]
        assert torch.equal(alone, features["test"])
