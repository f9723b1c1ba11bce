"""What the harmful data alone gives: it needs no weights, and is the same whatever model lies in the folder."""

import dataclasses

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_immunize.attacks import REFERENCES, AttackContext, run_suite
from hf_immunize.attacks.vision.context import THUMBNAIL
from hf_immunize.data import PixelDataset, fingerprint
from hf_immunize.records import AttackTrace


def blobs(rows: int, seed: int, side: int = 8) -> PixelDataset:
    patterns = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(rows) % 3
    noise = torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return PixelDataset(patterns[labels] + 0.5 * noise, labels, ["a", "b", "c"])


def context(folder, side=8):
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                       intermediate_size=8, num_labels=2)
    ViTForImageClassification(config).save_pretrained(folder)
    splits = {name: blobs(rows, seed, side)
              for seed, (name, rows) in enumerate({"attack": 60, "validation": 30, "test": 60}.items())}
    data = tuple(fingerprint(split, source="blobs", role=name) for name, split in splits.items())
    return AttackContext(folder=folder, role="nothing", data=data, **splits)


@pytest.mark.parametrize("name", list(REFERENCES))
def test_references_learn_from_pixels_without_a_model(tmp_path, name):
    folder = tmp_path / "model"
    run_suite(context(folder), REFERENCES, [name], (0, 1), folder)
    traces = [AttackTrace.read(path) for path in (folder / "traces" / "nothing").iterdir()]
    assert {trace.attack for trace in traces} == {name} and {trace.role for trace in traces} == {"nothing"}
    assert {(trace.model.architecture, trace.model.parameters) for trace in traces} == {("none", 0)}
    assert max(point.test for trace in traces for point in trace.curve) > 0.9
    assert {trace.config["feature_module"] for trace in traces} == {"pixels"} and traces[0].samples


def test_the_same_whatever_lies_in_the_folder_and_again_bit_for_bit(tmp_path):
    curves = []
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        run_suite(context(tmp_path / name), REFERENCES, ["pixel_network"], (0,), tmp_path / name)
        paths = sorted((tmp_path / name / "traces" / "nothing").iterdir())
        curves.append([AttackTrace.read(path).curve for path in paths])
    assert curves[0] == curves[1]


def test_large_images_are_averaged_down(tmp_path):
    large = context(tmp_path / "model", 2 * THUMBNAIL)
    features = large.features(0)["test"]
    assert features.shape == (60, 3 * THUMBNAIL**2)
    pixels = large.test.pixel_values
    assert features[0, 0] == pytest.approx(float(pixels[0, 0, :2, :2].mean()), abs=1e-6)
    assert dataclasses.replace(large, role="control").fingerprint.parameters > 0
