"""Encoded rows on disk and photos decoded when asked for: the same rows as in memory, encoded once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from denoiser_builders import build_denoiser, build_examples, build_scheduler
from PIL import Image
from pipeline_builders import build_text_pipeline

from hf_immunize.data import RowStore
from hf_immunize.data import caching as passes
from hf_immunize.data.fingerprint import digest_pixels
from hf_immunize.diffusion import LatentDataset, NoiseProcess, encoding, tasks
from hf_immunize.diffusion.encoding import encode
from hf_immunize.diffusion.exam import DenoisingExam
from hf_immunize.diffusion.photos import image_files, read_photos, read_pixels
from hf_immunize.diffusion.tasks import ConceptArguments, ConceptTask
from hf_immunize.errors import DataError
from hf_immunize.training.diffusion import DiffusionImmunizationConfig, DiffusionImmunizationTrainer

CAPTIONS = ["a photo of sks dog", "a photo of cat", "a photo of sks dog", "a portrait", "a photo", "sks person"]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_IMMUNIZE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "photos"
    folder.mkdir()
    for place in range(6):
        pixels = np.random.default_rng(place).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{place}.png")
    return folder


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "FluxPipeline", "PixArtSigmaPipeline"])
@pytest.mark.parametrize("prompt", ["a photo of sks dog", CAPTIONS], ids=["one prompt", "captions"])
def test_rows_on_disk_are_those_in_memory_and_encoded_once(photos, kind, prompt, monkeypatch):
    pipeline, labels = build_text_pipeline(kind), [0, 0, 0, 1, 1, 1]
    kept = encode(pipeline, read_pixels(photos, 16), prompt, labels, ["dog", "other"])
    made = encode(pipeline, read_photos(photos, 16), prompt, labels, ["dog", "other"], keep_bytes=0)
    assert list((photos.parent / "cache" / "encoded").glob("*/index.json"))
    assert torch.equal(made.latents, kept.latents) and torch.equal(made.labels, kept.labels)
    assert made.conditions.keys() == kept.conditions.keys()
    for name, value in kept.conditions.items():
        assert torch.equal(made.conditions[name], value), name
    assert made.fingerprint(source="s", role="r") == kept.fingerprint(source="s", role="r")
    rows = torch.tensor([4, 1])
    assert torch.equal(made.subset(rows).batch(torch.tensor([0])).latents, kept.latents[4:5])

    def never(*args, **kwargs):
        raise AssertionError("encoded again")

    real = encoding.encode_prompt
    asked: list[str] = []
    monkeypatch.setattr(encoding, "encode_prompt", lambda *args: asked.append(args[1]) or real(*args))
    again = encode(pipeline, read_photos(photos, 16), prompt, labels, ["dog", "other"], keep_bytes=0)
    assert torch.equal(again.latents, kept.latents) and len(asked) == 1  # of the first row, to see how large it is
    other = build_text_pipeline(kind, seed=1)
    assert not torch.equal(encode(other, read_photos(photos, 16), prompt, labels, ["dog", "other"],
                                  keep_bytes=0).latents, kept.latents)


def test_photos_are_decoded_when_asked_for(photos):
    held = read_photos(photos, 16)
    whole = read_pixels(photos, 16)
    assert held.shape == tuple(whole.shape) and len(held) == 6
    assert not any(isinstance(value, torch.Tensor) for value in vars(held).values())
    assert torch.equal(held.stacked(), whole) and torch.equal(torch.cat(list(held.split(4))), whole)
    assert torch.equal(held.subset([5, 2]).stacked([1]), whole[2:3])
    assert held.digests("photos") == [digest_pixels(row.numpy()) for row in whole]
    (photos / "3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="a readable image, got '3.png'"):
        held.stacked([3])


def test_the_pass_for_digests_is_kept_until_a_file_changes(photos, monkeypatch):
    monkeypatch.setattr(passes, "MANY", 1)
    first = read_photos(photos, 16).digests("photos")
    with monkeypatch.context() as context:
        context.setattr("hf_immunize.diffusion.photos.decode_image", lambda *args, **kwargs: 1 / 0)
        assert read_photos(photos, 16).digests("photos") == first
    Image.new("RGB", (20, 24), "red").save(image_files(photos)[2])
    other = read_photos(photos, 16).digests("photos")
    assert [row for row in range(6) if other[row] != first[row]] == [2]
    assert read_photos(photos, 32).digests("photos")[0] != first[0]


def on_disk(held: LatentDataset, folder) -> LatentDataset:
    columns = [(held.latents, *held.conditions.values())]
    store = RowStore.open_or_write(folder, iter(columns), len(held))
    return LatentDataset.stored(store, list(held.conditions), held.labels, held.label_names)


@pytest.mark.parametrize("objective", ["condition_number", "simulated_attack"])
def test_training_on_rows_on_disk_is_training_on_the_same_rows(tmp_path, objective):
    weights = []
    for name, change in (("memory", lambda held, _: held), ("disk", on_disk)):
        model = build_denoiser("sd")
        rows = [change(build_examples("sd", 16), tmp_path / f"{name}-0"),
                change(build_examples("sd", 12, seed=1, label=9), tmp_path / f"{name}-1")]
        args = DiffusionImmunizationConfig(
            str(tmp_path / name), max_steps=2, per_device_train_batch_size=6, per_device_harmful_batch_size=8,
            learning_rate=1e-3, use_cpu=True, disable_progress=True, objective=objective, save_steps=2,
        )
        DiffusionImmunizationTrainer(
            model, build_scheduler("sd"), args, train_dataset=rows[0], harmful_dataset=rows[1]
        ).train()
        weights.append({key: value.clone() for key, value in model.state_dict().items()})
        assert rows[0].fingerprint(source="", role="") == build_examples("sd", 16).fingerprint(source="", role="")
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize("size,rows", [(8, 3), (8, 256), (5, 4), (6, 7)])
def test_noise_that_is_drawn_again_is_that_of_one_call(size, rows):
    """25 numbers a row are no whole blocks of torch's; 36 x 4 are."""
    held = build_examples("sd", 5, size=size)
    if size == 5:
        held = LatentDataset(held.latents[:, :1], held.conditions, held.labels, held.label_names)
    exam = DenoisingExam(NoiseProcess.from_scheduler(build_scheduler("sd")), held, levels=3, seed=4, batch_size=rows)
    generator = torch.Generator().manual_seed(4)
    torch.rand(15, generator=generator, dtype=torch.float64)
    whole = torch.randn((15, *held.latents.shape[1:]), generator=generator)
    assert torch.equal(torch.cat(list(exam._noise.parts(rows))), whole)
    assert torch.equal(exam._noise[11], whole[11])
    assert not any(isinstance(value, torch.Tensor) and value.dim() == 4 for value in vars(exam._noise).values())


@pytest.mark.parametrize("colour", [False, True])
def test_pixels_of_a_large_concept_task_lie_on_disk(tmp_path, monkeypatch, colour):
    monkeypatch.setenv("HF_IMMUNIZE_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 8, 8, 3) if colour else (60, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x_train=images, y_train=np.arange(60) % 3)
    task = ConceptTask(ConceptArguments(
        str(tmp_path / "x.npz"), image_size=8, channels=3 if colour else 1, retain_labels="0", harmful_labels="1",
        benign_labels="2",
    ))
    kept = task.examples("harmful", "attack")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(tasks, "KEPT_BYTES", 0)
    stored = task.examples("harmful", "attack")
    assert torch.equal(stored.latents, kept.latents) and torch.equal(stored.labels, kept.labels)
    assert torch.equal(stored.conditions["class_labels"], kept.conditions["class_labels"])
    assert stored.fingerprint(source="", role="") == kept.fingerprint(source="", role="")
    assert len(list((tmp_path / "cache" / "pixels").glob("*/index.json"))) == 1
