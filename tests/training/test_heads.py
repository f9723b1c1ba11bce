"""Heads of every kind: ours on a headless backbone, regression, several labels, and masked images without labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_architectures import attack, by_hand, settled_garbage  # noqa: F401
from test_gradients import relative_error
from tiny_models import SIZE, tiny_backbone, tiny_classifier, tiny_config
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    ViTMAEForPreTraining,
    ViTMAEModel,
)

from hf_immunize import add_head
from hf_immunize.data import StepBatchSampler
from hf_immunize.errors import ConfigError, DataError, ModelError
from hf_immunize.features import BackboneForImageClassification
from hf_immunize.training.vision.primary import MULTI, REGRESSION, divergence

OBJECTIVE = "closed_form_adversary"


class Rows(Dataset):
    """Images with labels of any kind, or with a mask in their place."""

    def __init__(self, pixels: torch.Tensor, **columns: torch.Tensor):
        self.pixel_values, self.columns = pixels, columns

    def __len__(self) -> int:
        return len(self.pixel_values)

    def __getitem__(self, row: int) -> dict:
        return {"pixel_values": self.pixel_values[row]} | {name: part[row] for name, part in self.columns.items()}

    @property
    def labels(self) -> torch.Tensor:
        return self.columns["labels"]


def run(make_trainer, make_pixels, keeper, model, primary, **options):
    """Two steps in float64, and the harmful rows of the first."""
    harmful = make_pixels(12, seed=1, size=SIZE, dtype=torch.float64)
    settings = {"memorization": 0.5, "weight": "1", "strength": 1.0, "max_grad_norm": 0.0} | options
    trainer = make_trainer(
        model=model, primary=primary, harmful=harmful, callbacks=[keeper], objective=OBJECTIVE, horizon="100",
        max_steps=2, per_device_train_batch_size=12, **settings,
    )  # fmt: skip
    trainer.train()
    return trainer, harmful.subset(StepBatchSampler(harmful.labels.tolist(), 12, seed=7).global_batch(0))


@pytest.mark.parametrize(
    "name,pooling", [("vit", "first"), ("swin", "pooler"), ("resnet", "mean"), ("clip_vision_model", "pooler")]
)
def test_a_backbone_with_our_head_trains_reloads_and_can_be_attacked(
    make_trainer, make_pixels, keep_gradients, tmp_path, name, pooling
):
    primary = make_pixels(12, size=SIZE, dtype=torch.float64)

    def build() -> BackboneForImageClassification:
        backbone = tiny_backbone(name).double()
        return add_head(backbone, ["a", "b", "c"], pooling=pooling)

    trainer, harmful = run(make_trainer, make_pixels, keep_gradients, build(), primary)
    assert relative_error(keep_gradients.steps[0], by_hand(build(), primary, harmful, OBJECTIVE)) < 1e-8
    trainer.model.float()
    trainer.save_model(tmp_path / "saved")
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    assert type(reloaded) is BackboneForImageClassification and reloaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    ours, theirs = trainer.model.state_dict(), reloaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    pixels = primary.pixel_values[:4].float()
    bare = reloaded.backbone(pixel_values=pixels)
    pooled = {"first": lambda: bare.last_hidden_state[:, 0], "pooler": lambda: bare.pooler_output.flatten(1),
              "mean": lambda: bare.last_hidden_state.mean(dim=(2, 3))}[pooling]()  # fmt: skip
    assert torch.allclose(reloaded.classifier(pooled), reloaded(pixel_values=pixels).logits)
    assert {trace.outcome for trace in attack(tmp_path / "saved", make_pixels, tmp_path)} == {"completed"}


def test_a_head_that_cannot_be_put_on():
    vit, resnet = tiny_backbone("vit"), tiny_backbone("resnet")
    with pytest.raises(ConfigError, match="expected a pooling of .* got 'max'"):
        add_head(vit, 3, pooling="max")
    with pytest.raises(ConfigError, match="one label or more"):
        add_head(vit, 0)
    with pytest.raises(ModelError, match="expected tokens .* use 'mean'"):
        add_head(resnet, 3, pooling="first")
    with pytest.raises(ModelError, match="a pooler_output"):
        add_head(tiny_backbone("vit_mae"), 3, pooling="pooler")


KINDS = {
    "regression": (1, functional.mse_loss, "r2"),
    "multi_label_classification": (3, functional.binary_cross_entropy_with_logits, "accuracy"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("headed", [False, True], ids=["stock", "ours"])
def test_regression_and_several_labels_train_like_the_formula_and_are_judged(
    make_trainer, make_pixels, keep_gradients, tmp_path, kind, headed
):
    outputs, loss_of, metric = KINDS[kind]
    pixels = make_pixels(12, size=SIZE, dtype=torch.float64).pixel_values
    generator = torch.Generator().manual_seed(3)
    targets = torch.randn(12, generator=generator, dtype=torch.float64)
    if kind == MULTI:
        targets = (torch.rand(12, 3, generator=generator) < 0.5).double()
    primary = Rows(pixels, labels=targets)

    def build():
        if headed:
            return add_head(tiny_backbone("vit").double(), outputs, problem_type=kind)
        return tiny_classifier("vit", outputs, problem_type=kind).double()

    model = build()
    trainer, harmful = run(make_trainer, make_pixels, keep_gradients, model, primary, evaluation=primary)
    truth = by_hand(build(), primary, harmful, OBJECTIVE, lambda ours, wanted: loss_of(ours.view_as(wanted), wanted))
    assert relative_error(keep_gradients.steps[0], truth) < 1e-6  # targets pass through float32
    logits, wanted = model.eval()(pixel_values=pixels).logits.detach().numpy(), targets.numpy()
    if kind == MULTI:
        by_formula = np.mean((logits > 0) == (wanted > 0.5))
    else:
        by_formula = 1 - np.sum((logits[:, 0] - wanted) ** 2) / np.sum((wanted - wanted.mean()) ** 2)
    assert trainer.evaluate()[f"eval_{metric}"] == pytest.approx(float(by_formula), rel=1e-5)
    model.float()
    trainer.save_model(tmp_path / "saved")
    assert {trace.outcome for trace in attack(tmp_path / "saved", make_pixels, tmp_path)} == {"completed"}


def test_distances_to_the_model_of_before_by_kind_of_head():
    ours, theirs = torch.tensor([[0.3, -1.2], [2.0, 0.1]]), torch.tensor([[0.0, 1.0], [-0.5, 0.2]])
    bits = torch.distributions.kl_divergence(
        torch.distributions.Bernoulli(logits=theirs), torch.distributions.Bernoulli(logits=ours)
    )
    assert float(divergence(ours, theirs, MULTI)) == pytest.approx(float(bits.sum(1).mean()), rel=1e-5)
    assert float(divergence(ours, theirs, REGRESSION)) == pytest.approx(float((ours - theirs).square().mean()))


@pytest.mark.parametrize(
    "kind,outputs,labels,message",
    [
        ("multi_label_classification", 3, torch.zeros(12, 2), r"labels of shape \(3,\) .* got \(2,\) in row 0"),
        ("regression", 1, torch.full((12,), float("nan")), "finite labels in train_dataset, got nan in row 0"),
        ("regression", 2, torch.zeros(12), r"labels of shape \(2,\) in train_dataset"),
    ],
    ids=["a bit short", "no number", "one of two targets"],
)
def test_targets_that_do_not_fit_the_head_are_refused_before_training(
    make_trainer, make_pixels, kind, outputs, labels, message
):
    pixels = make_pixels(12, size=SIZE).pixel_values
    with pytest.raises(DataError, match=message):
        make_trainer(
            model=tiny_classifier("vit", outputs, problem_type=kind), primary=Rows(pixels, labels=labels),
            harmful=make_pixels(12, seed=1, size=SIZE),
        )  # fmt: skip


MASKED = {
    "vit": {"encoder_stride": 8},
    "deit": {"encoder_stride": 8, "architectures": None},
    "swin": {"encoder_stride": 8},
    "vit_mae": {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
                "decoder_intermediate_size": 16},
}  # fmt: skip


def masked_model(name: str):
    torch.manual_seed(0)
    config = tiny_config(name, **MASKED[name])
    model = ViTMAEForPreTraining(config) if name == "vit_mae" else AutoModelForMaskedImageModeling.from_config(config)
    return model.double()


def masked_rows(name: str, pixels: torch.Tensor) -> Rows:
    patches = (SIZE // tiny_config(name).patch_size) ** 2
    draws = torch.rand(len(pixels), patches, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return Rows(pixels, **({"noise": draws} if name == "vit_mae" else {"bool_masked_pos": draws < 0.5}))


@pytest.mark.parametrize("name", MASKED)
def test_masked_image_pretraining_is_immunized_where_lora_would_train(
    make_trainer, make_pixels, keep_gradients, tmp_path, name
):
    rows = masked_rows(name, make_pixels(12, size=SIZE, dtype=torch.float64).pixel_values)
    options = {"sites": "lora", "feature_distillation": 0.1, "evaluation": rows}
    trainer, _ = run(make_trainer, make_pixels, keep_gradients, masked_model(name), rows, **options)
    with_terms = keep_gradients.steps[0]
    assert {"harmful_adversary_r2", "primary_loss", "feature_distillation"} <= set(trainer.state.log_history[0])
    keeper = type(keep_gradients)()
    run(make_trainer, make_pixels, keeper, masked_model(name), rows, **(options | {"strength": 0.0}))
    plain = keeper.steps[0]
    assert with_terms.keys() == plain.keys()
    changed = {key for key in plain if not torch.allclose(with_terms[key], plain[key], rtol=1e-4, atol=0.0)}
    first = next(key for key in plain if "patch_embed" in key)
    assert first in changed and not any(key.startswith("decoder") for key in changed)

    trainer.model.float()
    trainer.save_model(tmp_path / "pretrained")
    type(trainer.model).from_pretrained(tmp_path / "pretrained")
    if name == "vit_mae":
        classifier = add_head(ViTMAEModel.from_pretrained(tmp_path / "pretrained", mask_ratio=0.0), 3)
    else:
        classifier = AutoModelForImageClassification.from_pretrained(tmp_path / "pretrained", num_labels=3)
    site = trainer.site.split(".", 1)[1]
    trunk = classifier.get_submodule(classifier.base_model_prefix)
    assert torch.equal(trunk.get_submodule(site).weight, trainer.model.get_submodule(trainer.site).weight)
    classifier.save_pretrained(tmp_path / "saved")
    assert {trace.outcome for trace in attack(tmp_path / "saved", make_pixels, tmp_path)} == {"completed"}


def test_options_that_masked_pretraining_cannot_have(make_trainer, make_pixels):
    pixels = make_pixels(12, size=SIZE, dtype=torch.float64).pixel_values
    model, harmful = masked_model("vit_mae"), make_pixels(12, seed=1, size=SIZE, dtype=torch.float64)
    common = {"model": model, "harmful": harmful, "sites": "lora"}
    with pytest.raises(ConfigError, match="computes the same features twice .* noise for ViTMAE"):
        make_trainer(primary=Rows(pixels), feature_distillation=1.0, **common)
    rows = masked_rows("vit_mae", pixels)
    with pytest.raises(ConfigError, match="no distillation and no max_primary_drop for a primary task without labels"):
        make_trainer(primary=rows, evaluation=rows, distillation=1.0, max_primary_drop=1.0, **common)
    with pytest.raises(ModelError, match="expected one linear classification head"):
        make_trainer(primary=rows, **(common | {"sites": "head"}))


def test_a_backbone_keeps_its_own_weights_under_our_head():
    backbone = tiny_backbone("vit")
    model = add_head(backbone, 2)
    assert model.backbone is backbone and isinstance(backbone, type(AutoModel.from_config(backbone.config)))
