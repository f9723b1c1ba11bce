"""What the harmful data alone gives: it needs no weights, and is the same whatever model lies in the folder."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_immunize.attacks import ATTACKS, REFERENCES, AttackContext, run_suite
from hf_immunize.attacks.vision.context import THUMBNAIL
from hf_immunize.attacks.vision.hand_made import colour_histograms, direction_histograms
from hf_immunize.certification.evidence import read_traces
from hf_immunize.certification.uplift import without_model
from hf_immunize.data import PixelDataset, fingerprint
from hf_immunize.errors import ConfigError, RecordError
from hf_immunize.records import AttackTrace
from hf_immunize.stages.attack import AttackOptions, _into


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
    assert max(point.test for trace in traces for point in trace.curve) > (0.8 if name == "hand_made_ridge" else 0.9)
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


def stripes(angle, side=16, phase=0.0):
    """An image of stripes: what varies is the direction of its gradient alone."""
    across, down = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy")
    wave = torch.sin(phase + (across * math.cos(angle) + down * math.sin(angle)).double())
    return wave.float().expand(1, 3, -1, -1)


@pytest.mark.parametrize("bin_", range(9))
def test_gradients_are_counted_by_their_direction(bin_):
    rows = direction_histograms(stripes(math.pi * bin_ / 9))
    coarse = rows[0, : 9 * 16].reshape(9, 16).sum(dim=1)
    assert int(coarse.argmax()) == bin_ and rows.shape == (1, 9 * (16 + 64))
    turned = direction_histograms(-3.0 * stripes(math.pi * bin_ / 9) + 5.0)
    assert torch.allclose(rows, turned, atol=1e-4), "contrast, brightness and sign do not count"
    assert direction_histograms(torch.ones(1, 3, 16, 16)).abs().max() == 0


def test_colours_are_counted_by_channel():
    image = torch.tensor([0.0, 0.0, 0.5, 1.0]).reshape(1, 1, 2, 2).repeat(1, 2, 1, 1)
    image[:, 1] = 1.0
    rows = colour_histograms(image, torch.zeros(2), torch.ones(2)).reshape(8, 2)
    assert rows[:, 0].tolist() == [0.5, 0, 0, 0, 0.25, 0, 0, 0.25] and rows[7, 1] == 1


def test_directions_tell_what_pixels_do_not(tmp_path):
    """Stripes at any phase: a ridge on pixels is at chance, and so a base that tells them apart gave no uplift."""
    def split(rows, seed):
        phases = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) * 2 * math.pi
        labels = torch.arange(rows) % 2
        images = [stripes(math.pi * (0.1 + 0.4 * int(label)), 8, float(phase))
                  for label, phase in zip(labels, phases, strict=True)]
        return PixelDataset(torch.cat(images), labels, ["one", "other"])

    plain = context(tmp_path / "model")
    splits = {name: split(rows, seed) for seed, (name, rows) in enumerate(
        {"attack": 40, "validation": 40, "test": 80}.items())}
    made = dataclasses.replace(plain, **splits, _features={}, prepared={})
    reach = {}
    for name in ("pixel_ridge", "hand_made_ridge"):
        run_suite(made, REFERENCES, [name], (0,), tmp_path / name)
        traces = [AttackTrace.read(path) for path in (tmp_path / name / "traces" / "nothing").iterdir()]
        best = max((point for trace in traces for point in trace.curve), key=lambda point: point.validation)
        reach[name] = best.test
    assert reach["hand_made_ridge"] > 0.95 and reach["pixel_ridge"] < 0.75, reach


def test_another_public_model_counts_as_what_an_attacker_has_anyway(tmp_path):
    made = {}
    for seed, name in enumerate(("base", "other")):
        torch.manual_seed(seed)
        made[name] = dataclasses.replace(context(tmp_path / name), role="alternative", _features={})
    chosen = {"ridge_probe": {"penalty": (1e-2,), "features": ("centered",)}}
    run_suite(made["other"], ATTACKS, ["ridge_probe"], (0, 1), tmp_path / "base", chosen)
    base, other = made["base"].fingerprint, made["other"].fingerprint
    traces = read_traces(tmp_path / "base", "alternative", base, ATTACKS)
    assert len(traces) == 2 and traces[0].model.weights == other.weights != base.weights
    anyway = without_model({"alternative": traces}, 60, 1 / 3)
    assert anyway.mean > 1 / 3 and anyway.told == "ridge_probe of other"
    with pytest.raises(RecordError, match="expected a trace of the weights"):
        read_traces(tmp_path / "base", "alternative", other, ATTACKS)


def test_an_alternative_needs_a_place_beside_the_base(tmp_path):
    with pytest.raises(ConfigError, match="expected output_path with role alternative"):
        _into(AttackOptions("other/model", role="alternative"))
    assert _into(AttackOptions("a/b", role="alternative", output_path="runs/base")) == Path("runs/base/alternative")
