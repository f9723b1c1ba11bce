"""Data larger than memory: what constructors read, streams on either side, workers, and resuming by skipping."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from launching import run_script
from PIL import Image as PILImage
from safetensors.torch import load_file
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, get_worker_info

from hf_immunize.data import NamedStream, RankBatches
from hf_immunize.errors import ConfigError, DataError
from hf_immunize.training.vision.checkpoints import last_complete_checkpoint

FEW = 8
"""Rows of a dataset that a constructor may read."""
ROWS = 60


def make_row(number: int, rows: int = ROWS) -> dict:
    generator = torch.Generator().manual_seed(number)
    return {"pixel_values": torch.randn(3, 8, 8, generator=generator) + number % 3, "labels": number % 3}


class Counted(TorchDataset):
    """Numbered rows that nobody has read before they are asked for."""

    def __init__(self, rows: int = ROWS):
        self.rows, self.read = rows, []

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict:
        self.read.append(row)
        return make_row(row)


class CountedStream(IterableDataset):
    """Rows in one order; workers share them."""

    def __init__(self, rows: int = ROWS, labelled: bool = True):
        self.rows, self.labelled, self.read = rows, labelled, []

    def __iter__(self):
        info = get_worker_info()
        for number in range(0 if info is None else info.id, self.rows, 1 if info is None else info.num_workers):
            self.read.append(number)
            row = make_row(number)
            yield row if self.labelled else {"pixel_values": row["pixel_values"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two parquet files of encoded images with their classes."""
    folder = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(0)
    images = [PILImage.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(ROWS)]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    held = Dataset.from_dict({"image": images, "label": [row % 3 for row in range(ROWS)]}, features)
    for part in range(2):
        held.shard(2, part).to_parquet(folder / f"train-{part}.parquet")
    return [str(folder / f"train-{part}.parquet") for part in range(2)]


class Pixels:
    """A transform that counts the images it has seen; picklable, as ``datasets`` wants it."""

    seen = 0

    def __call__(self, batch: dict) -> dict:
        Pixels.seen += len(batch["image"])
        pixels = [torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255 for image in batch["image"]]
        return {"pixel_values": pixels, "labels": batch["label"]}


def one(row: dict) -> dict:
    Pixels.seen += 1
    return {"pixel_values": torch.tensor(np.asarray(row["image"])).permute(2, 0, 1) / 255, "labels": row["label"]}


def streamed(files: list[str]):
    return load_dataset("parquet", data_files=files, split="train", streaming=True).map(one, remove_columns=["image"])


SIDES = {"primary": "train_dataset", "harmful": "harmful_dataset", "evaluation": "eval_dataset"}


@pytest.mark.parametrize("kind", [Counted, CountedStream])
@pytest.mark.parametrize("side", SIDES)
def test_a_constructor_reads_a_few_rows(make_trainer, kind, side):
    held = kind(5000)
    make_trainer(**{side: held}, max_steps=2)
    assert len(held.read) <= FEW and max(held.read) < FEW


@pytest.mark.parametrize("side", ["primary", "harmful"])
def test_a_constructor_runs_a_transform_on_a_few_rows_and_takes_labels_from_the_column(make_trainer, files, side):
    table = load_dataset("parquet", data_files=files, split="train").with_transform(Pixels())
    Pixels.seen = 0
    trainer = make_trainer(**{side: table}, max_steps=2)
    assert 0 < Pixels.seen <= FEW
    trainer._count_rows()
    assert 0 < Pixels.seen <= FEW  # nothing is left to be counted


@pytest.mark.parametrize("side", ["primary", "harmful"])
def test_a_constructor_reads_a_few_rows_of_a_stream_of_files(make_trainer, files, side):
    Pixels.seen = 0
    make_trainer(**{side: streamed(files)}, max_steps=2)
    assert 0 < Pixels.seen <= FEW


def test_labels_are_counted_once_when_training_starts(make_trainer):
    harmful, primary = Counted(), Counted()
    trainer = make_trainer(primary=primary, harmful=harmful, max_steps=2)
    before = len(harmful.read), len(primary.read)
    trainer._count_rows()
    assert harmful.read[before[0] :] == list(range(ROWS)) and len(primary.read) == before[1]
    trainer._count_rows()
    assert len(harmful.read) == before[0] + ROWS
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.harmful_task.targets.values.tolist() == [row % 3 for row in range(ROWS)]


def test_what_a_counted_pass_finds_wrong_is_named(make_trainer):
    class Odd(Counted):
        def __getitem__(self, row):
            return super().__getitem__(row) | {"labels": 7 if row == 50 else row % 3}

    with pytest.raises(DataError, match=r"every class in harmful_dataset, got none of class 3 \(3\), 4 \(4\)"):
        make_trainer(harmful=Odd()).train()
    with pytest.raises(DataError, match=r"labels in 0\.\.2 in train_dataset, got 7 in row 50"):
        make_trainer(primary=Odd(), max_steps=8).train()


def test_a_transform_that_makes_other_labels_than_the_column_is_found_out(make_trainer, files):
    table = load_dataset("parquet", data_files=files, split="train")
    late = {float(pixels.mean()) for pixels in Pixels()(table[20:])["pixel_values"]}

    def sometimes(batch):
        made = Pixels()(batch)
        pairs = zip(made["pixel_values"], made["labels"], strict=True)
        return made | {"labels": [2 if float(pixels.mean()) in late else label for pixels, label in pairs]}

    with pytest.raises(DataError, match=r"label [01] in row \d+ of harmful_dataset, as its column says, got 2"):
        make_trainer(harmful=table.with_transform(sometimes), max_steps=8).train()


def stream_of(kind: str, files: list[str]):
    return CountedStream() if kind == "torch" else streamed(files)


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["torch", "datasets"])
def test_a_stream_trains_as_its_rows_in_their_order(make_trainer, files, kind, monkeypatch):
    """By hand: the rows of a list, in batches as they come, over the end and on from the beginning."""
    options = {"max_steps": 7, "per_device_train_batch_size": 6}
    rows = list(stream_of(kind, files))
    order = [row for _ in range(4) for row in range(ROWS)]

    class InOrder:
        def __init__(self, batch):
            self.batch = batch

        def global_batch(self, step):
            return torch.tensor(order[step * self.batch : (step + 1) * self.batch])

    truth = make_trainer(primary=rows, harmful=rows, train_sampling_strategy="sequential", **options)
    truth._streams["harmful"].prepare()
    truth._streams["harmful"]._sampler.global_batch = InOrder(12).global_batch
    by_hand = losses(truth)
    found = losses(make_trainer(primary=stream_of(kind, files), harmful=stream_of(kind, files), **options))
    assert found == by_hand and len(found) == 7  # 7 x 12 rows: the harmful stream has begun again


@pytest.mark.parametrize("kind,workers", [
    ("torch", 0), ("datasets", 0), ("torch", 2),
    pytest.param("datasets", 2, marks=pytest.mark.slow),  # workers that read parquet take seconds to leave
])  # fmt: skip
def test_a_run_with_streams_resumes_exactly(make_trainer, make_vit, files, kind, workers, tmp_path):
    """After the end of the harmful stream; by reading what lies before."""
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 6, "dataloader_num_workers": workers,
               "objective": "closed_form_adversary", "dataloader_prefetch_factor": 2 if workers else None}
    model = make_vit()
    whole = make_trainer(model=model, primary=stream_of(kind, files), harmful=stream_of(kind, files), **options)
    whole.train()
    again = make_vit()
    resumed = make_trainer(model=again, primary=stream_of(kind, files), harmful=stream_of(kind, files), **options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-6")
    assert last_complete_checkpoint(whole.args.output_dir) is not None and resumed.state.global_step == 7
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.slow
def test_an_unlabelled_stream_trains_and_is_measured_and_says_how_batches_are_drawn(make_trainer, caplog):
    with caplog.at_level("WARNING"):
        trainer = make_trainer(harmful=CountedStream(labelled=False), max_steps=2)
    assert "harmful_dataset is a stream: batches are taken as they come" in caplog.text
    trainer.train()
    assert trainer.outcome.rows == ROWS and trainer.outcome.probe_before is None


def test_a_stream_for_evaluation_gives_the_metrics_of_its_rows(make_trainer):
    rows = list(CountedStream())
    found = [make_trainer(evaluation=held).evaluate() for held in (rows, CountedStream())]
    for name in ("eval_loss", "eval_accuracy"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-6)


def test_what_a_stream_cannot_do_is_refused(make_trainer, tmp_path):
    with pytest.raises(ConfigError, match="numbered rows for cache_frozen_features, got a stream as harmful_dataset"):
        make_trainer(harmful=CountedStream(), cache_frozen_features=True, trainable_modules="last:1")
    with pytest.raises(ConfigError, match="max_steps for a stream as train_dataset"):
        make_trainer(primary=CountedStream(), max_steps=-1)
    with pytest.raises(ConfigError, match="no harmful_classes_per_batch for harmful_dataset, a stream"):
        make_trainer(harmful=CountedStream(), harmful_classes_per_batch=2)
    with pytest.raises(DataError, match="how many classes it has as harmful_dataset for harmful_attacker_gain"):
        make_trainer(harmful=CountedStream(), objective="imma")
    with pytest.raises(DataError, match="a 'labels' column in harmful_dataset, for harmful_adversary_r2"):
        make_trainer(harmful=CountedStream(labelled=False), objective="closed_form_adversary")
    with pytest.raises(DataError, match="at least one row in harmful_dataset, got an empty stream"):
        make_trainer(harmful=CountedStream(0))


@pytest.mark.parametrize("side", ["primary", "harmful"])
def test_a_row_of_a_stream_that_cannot_be_read_is_named(make_trainer, side):
    class Broken(CountedStream):
        def __iter__(self):
            for number, row in enumerate(super().__iter__()):
                if number == 5:
                    raise OSError("cannot identify image file 'cat.jpg'")
                yield row

    with pytest.raises(DataError, match=rf"row 5 of {SIDES[side]}, got OSError: cannot identify image file 'cat.jpg'"):
        make_trainer(**{side: Broken()}, max_steps=8).train()


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_out_the_batches_of_a_stream(workers, world):
    def batches(rank: int, size: int, skip: int = 0) -> list:
        stream = NamedStream(CountedStream(31), "x", repeat=True)
        batches = RankBatches(stream, lambda rows: [row["pixel_values"] for row in rows], 6, rank, size, skip)
        loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=workers)
        return [batch for _, batch in zip(range(9), loader, strict=False)]

    whole = batches(0, 1)
    assert all(len(batch) == 6 for batch in whole)
    for rank in range(world):
        for mine, everywhere in zip(batches(rank, world), whole, strict=True):
            assert torch.equal(torch.stack(mine), torch.stack(everywhere[rank::world]))
    for mine, everywhere in zip(batches(0, 1, skip=4)[4:], whole[4:], strict=True):
        assert torch.equal(torch.stack(mine), torch.stack(everywhere))


@pytest.mark.parametrize("make", [Counted, CountedStream])
def test_both_streams_take_every_option_of_the_loader(make_trainer, make, monkeypatch):
    asked = []
    original = torch.utils.data.DataLoader.__init__

    def noted(self, *args, **kwargs):
        asked.append(kwargs)
        original(self, *args, **kwargs)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", noted)
    options = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3, "dataloader_persistent_workers": True,
               "dataloader_pin_memory": True}
    trainer = make_trainer(primary=make(), harmful=make(), max_steps=2, **options)
    trainer.train()
    loaders = [words for words in asked if words.get("prefetch_factor") == 3]
    assert len(loaders) >= 2 and all(words["persistent_workers"] for words in loaders)
    stream = trainer._streams["harmful"]
    assert stream._loader.persistent_workers and stream._loader.prefetch_factor == 3
    first = stream.batch(0)["pixel_values"]
    if make is Counted:
        workers = stream._loader._iterator._workers
        stream.batch(5)
        assert torch.equal(stream.batch(0)["pixel_values"], first)
        assert stream._loader._iterator._workers is workers and workers[0].is_alive()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of what runs of one and of two processes left."""
    folder, script = tmp_path_factory.mktemp("weights"), Path(__file__).parent / "streamed_run.py"
    for processes in (1, 2):
        run_script(
            script, str(folder / f"{processes}"), str(processes), processes=processes,
            HF_IMMUNIZE_CACHE=str(folder / "cache"),
        )  # fmt: skip
    return folder


@pytest.mark.slow
def test_two_processes_train_on_streams_as_one_does(runs):
    one, two = (load_file(runs / f"{processes}") for processes in (1, 2))
    for name, value in one.items():
        assert float((value - two[name]).abs().max()) < 1e-8 * max(float(value.abs().max()), 1e-3), name


def test_one_of_two_processes_counts_for_both(runs):
    found = [load_file(runs / f"2-counted-{rank}") for rank in range(2)]
    assert sum(int(part["read"]) for part in found) == 2 * ROWS  # for labels, and for a digest
    assert all(part["labels"].tolist() == [row % 3 for row in range(ROWS)] for part in found)
    assert int(load_file(runs / "1-counted-0")["read"]) == 2 * ROWS and not list(runs.glob("cache/labels/*"))
