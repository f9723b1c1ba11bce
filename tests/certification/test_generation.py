"""What was drawn as figures: SGR against its definition, pictures cut as they were laid, features of every kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from denoiser_builders import build_examples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from trace_builders import trace

from hf_immunize.attacks.core.suite import picture_name
from hf_immunize.certification.drawings import recognised
from hf_immunize.certification.generation import (
    measure_frechet,
    measure_similarity,
    ratio_interval,
    real_images,
)
from hf_immunize.certification.similarity import FeatureSimilarity, ImageFeatures
from hf_immunize.diffusion import DRAWN_SHARES, drawing_steps, grid_png, split_grid, to_images
from hf_immunize.errors import ModelError, RecordError
from hf_immunize.linalg import frechet_distance
from hf_immunize.records import atomic_write


class Brightness:
    """A similarity that can be worked out by hand: the mean grey level of what was drawn."""

    name = "brightness"

    def __call__(self, real, drawn):
        assert all(image.size == real[0].size for image in drawn)
        return sum(sum(image.getdata()) / (image.width * image.height) for image in drawn) / len(drawn)


def grey(levels: list[list[float]], size: int = 4) -> bytes:
    """A picture: one line per step, one image per level (0..255)."""
    pixels = torch.tensor(levels).flatten()[:, None, None, None].expand(-1, 1, size, size) / 127.5 - 1
    return grid_png(pixels, len(levels[0]))


@settings(max_examples=20, deadline=None)
@given(lines=st.integers(1, 3), columns=st.integers(1, 5), height=st.integers(1, 9), width=st.integers(1, 9),
       channels=st.sampled_from([1, 3]))
def test_a_picture_is_cut_into_the_images_it_was_laid_of(lines, columns, height, width, channels):
    pixels = torch.rand(lines * columns, channels, height, width) * 2 - 1
    cut = split_grid(grid_png(pixels, columns), (width, height))
    assert [len(line) for line in cut] == [columns] * lines
    laid = to_images(pixels)
    assert [image.tobytes() for line in cut for image in line] == [image.tobytes() for image in laid]


def test_a_picture_of_another_size_or_none_is_refused():
    with pytest.raises(RecordError, match="whole images"):
        split_grid(grey([[1, 2]]), (5, 4))
    with pytest.raises(RecordError, match="expected a PNG"):
        split_grid(b"GIF89a", (4, 4))


def test_steps_of_drawing():
    assert drawing_steps(150) == [15, 45, 150] and drawing_steps(2) == [1, 2] and drawing_steps(1) == [1]
    assert DRAWN_SHARES[-1] == 1


def test_the_ratio_is_its_definition_and_its_mean_over_concepts():
    one, other = ([0.8, 0.5], [0.4, 0.4]), ([1.0, 0.2], [1.1, 0.1])
    assert ratio_interval([one]).estimate == pytest.approx((0.5 + 0.2) / 2)
    assert ratio_interval([one, other]).estimate == pytest.approx(((0.5 - 0.1) / 2 + (0.2 + 0.5) / 2) / 2)
    assert ratio_interval([one]).samples == 2 and ratio_interval([([1.0], [0.5])]).low is None
    lost = ratio_interval([([0.0, 0.5], [0.1, 0.1])])
    assert (lost.estimate, lost.low, lost.samples) == (None, None, 0)


def examples(labels: list[int]):
    held = build_examples("unet", len(labels))
    held.labels = torch.tensor(labels)
    return held


def sit(folder, role, pictures):
    """Traces of two seeds with these pictures."""
    traces = []
    for seed, levels in enumerate(pictures):
        run = trace([(100, 0.5)], role=role, seed=seed, attack="diffusion_lora", budget=100)
        atomic_write(folder / picture_name(run), grey(levels))
        traces.append(run)
    return traces


def test_gaps_are_measured_per_step_and_seed_and_concept(tmp_path):
    real = real_images(examples([9, 8, 9]), [Image.new("L", (4, 4))] * 3)
    assert {name: len(images) for name, images in real.items()} == {"8": 1, "9": 2}
    base = [[[100, 50], [100, 50], [200, 50]], [[100, 40], [100, 40], [100, 40]]]
    subject = [[[100, 50], [50, 50], [50, 100]], [[100, 40], [50, 20], [75, 40]]]
    traces = {"control": sit(tmp_path, "control", base), "subject": sit(tmp_path, "subject", subject)}
    found = {gap.concept: gap for gap in measure_similarity(tmp_path, traces, real, Brightness(), "harmful")}
    assert list(found) == ["8", "9", "mean of 2 concepts"]
    eight, nine, mean = found.values()
    assert eight.steps == [10, 30, 100] and eight.seeds == [0, 1] and eight.similarity == "brightness"
    assert eight.base == [[100, 100], [100, 100], [200, 100]] and eight.immunized[2] == [50, 75]
    assert [interval.estimate for interval in eight.ratio] == pytest.approx([0, 0.5, (0.75 + 0.25) / 2])
    assert nine.ratio[2].estimate == pytest.approx((-1 + 0) / 2)
    assert mean.ratio[2].estimate == pytest.approx((0.5 - 0.5) / 2) and mean.base[2] == [125, 70]


def test_a_seed_without_a_picture_on_one_side_is_left_out(tmp_path):
    real = {"9": [Image.new("L", (4, 4))]}
    lines = [[80], [80], [80]]
    traces = {"control": sit(tmp_path, "control", [lines, lines]), "subject": sit(tmp_path, "subject", [lines, lines])}
    (tmp_path / picture_name(traces["subject"][0])).unlink()
    (gap,) = measure_similarity(tmp_path, traces, real, Brightness(), "benign")
    assert gap.seeds == [1] and gap.ratio[0].low is None
    (tmp_path / picture_name(traces["control"][1])).unlink()
    assert measure_similarity(tmp_path, traces, real, Brightness(), "benign") == []


def test_a_picture_with_other_lines_is_refused(tmp_path):
    traces = {role: sit(tmp_path, role, [[[80], [80]]]) for role in ("control", "subject")}
    with pytest.raises(RecordError, match="3 lines"):
        measure_similarity(tmp_path, traces, {"9": [Image.new("L", (4, 4))]}, Brightness(), "harmful")


def test_the_frechet_gap_is_that_of_the_features_and_its_interval_holds_the_truth():
    """Images of two grey levels a row; 'features' are these levels, so that the true distance is known."""
    def levels(mean: float, seed: int) -> list:
        drawn = 128 + mean + 10 * torch.randn(400, 1, 1, 2, generator=torch.Generator().manual_seed(seed))
        return [Image.fromarray(row[0].clamp(0, 255).byte().numpy()) for row in drawn]

    def features(images):
        return torch.tensor([list(image.getdata()) for image in images]).float()

    model = type("Levels", (), {"name": "levels", "__call__": lambda self, images: features(images)})()
    base, subject, real = levels(0, 1), levels(20, 1), levels(0, 2)
    found = measure_frechet(model, base, subject, real)
    assert found.base == pytest.approx(frechet_distance(features(base), features(real)))
    assert found.immunized == pytest.approx(frechet_distance(features(subject), features(real)))
    assert found.rise.low < 2 * 20**2 < found.rise.high and found.rise.high - found.rise.low < 200
    assert (found.images, found.real, found.features) == (400, 400, "levels")


def save(folder, model):
    model.save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8,
         "patch_size": 4}


def tiny(kind: str):
    torch.manual_seed(0)
    if kind == "classifier":
        return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, num_labels=5))
    if kind == "clip":
        text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        return transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=6)
        )
    return transformers.Dinov2Model(transformers.Dinov2Config(**{**SMALL, "mlp_ratio": 2}))


@pytest.mark.parametrize(("kind", "width"), [("classifier", 8), ("clip", 6), ("dinov2", 8)])
def test_features_of_every_kind_of_model(tmp_path, kind, width):
    model = tiny(kind).eval()
    seen_by = ImageFeatures.of(save(tmp_path / "seer", model))
    images = to_images(torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1)
    found = seen_by(images)
    assert found.shape == (60, width) and kind in seen_by.name
    pixels = seen_by.processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        if kind == "clip":
            wanted = model.visual_projection(model.vision_model(pixels).pooler_output)
        elif kind == "classifier":
            wanted = model.vit(pixels).last_hidden_state[:, 0]
        else:
            wanted = model(pixels).pooler_output
    torch.testing.assert_close(found, wanted)
    cosine = torch.nn.functional.cosine_similarity(found[:10, None], found[None, 10:], dim=-1).mean()
    assert FeatureSimilarity(seen_by)(images[:10], images[10:]) == pytest.approx(float(cosine), rel=1e-5)
    assert FeatureSimilarity(seen_by)(images[:1], images[:1]) == pytest.approx(1)


def test_a_model_of_one_channel_sees_grey_images_in_both_places(tmp_path):
    """Three channels came before: a judge or a seer of grey images could not be asked."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL, num_channels=1, num_labels=5)
    model = transformers.ViTForImageClassification(config).eval()
    folder = save(tmp_path / "seer", model)
    generator = torch.Generator().manual_seed(3)
    images = [image.resize((11 + place % 3, 9)) for place, image in enumerate(
        to_images(torch.rand(20, 3, 8, 8, generator=generator) * 2 - 1))]
    grey_images = [image.convert("L").resize((8, 8), Image.Resampling.BILINEAR) for image in images]
    pixels = torch.stack([torch.tensor(np.asarray(image))[None] for image in grey_images]) / 255
    pixels = (pixels - 0.5) / 0.5
    with torch.no_grad():
        features, logits = model.vit(pixels).last_hidden_state[:, 0], model(pixels).logits
    torch.testing.assert_close(ImageFeatures.of(folder)(images), features, atol=1e-5, rtol=1e-4)
    wanted = [model.config.id2label[int(row)] for row in logits.argmax(dim=-1)]
    assert recognised(folder, images, wanted) == [True] * 20


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="image model"):
        ImageFeatures.of(tmp_path)
