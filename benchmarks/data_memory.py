"""Peak memory from 1,000 to 50,000 rows: training on vision data of every kind and on encoded diffusion conditions,
and attacks whose validation and test images lie on disk.

    OMP_NUM_THREADS=1 python benchmarks/data_memory.py [--rows 1000 10000 50000] [--size 64] [--steps 5] [--case NAME]

Vision: JPEG files in an Arrow table on disk (256 different pictures, again and again), as primary and as harmful
rows of a tiny random ViT: a table with a transform, a stream of it, a torch Dataset of the user's own, and what the
recipes' ``preprocess`` gives. Diffusion: latents and text conditions in a ``RowStore``, of a tiny UNet; beside it the
same rows in memory, for comparison. Attacks: full fine-tuning and a ridge probe of the same ViT, trained on 64 rows of
the table and judged on all others. A few steps each, in a process of its own. Told are the peak of memory that the
process itself holds (RssAnon, looked at every 20 ms), libraries included; the peak of what is resident in all, with
pages of mapped files that the system drops when it needs room; and what the rows' float32 tensors would take. Random
pictures and weights show memory alone.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import highest_resident

PICTURES, CLASSES, TOKENS, WIDTH, SIDE = 256, 10, 16, 256, 8
VISION = ("table with a transform", "stream", "torch Dataset", "recipes' preprocess", "attack")
DIFFUSION = ("conditions on disk", "conditions in memory")


def write_table(folder: Path, rows: int, size: int) -> Path:
    """A table of encoded pictures with classes, as ``save_to_disk`` writes it."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Picture

    place = folder / f"table-{rows}"
    rng, encoded = np.random.default_rng(0), []
    for _ in range(PICTURES):
        held = io.BytesIO()
        Picture.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(held, "JPEG", quality=50)
        encoded.append({"bytes": held.getvalue(), "path": None})
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in range(CLASSES)])})

    def make(rows: int):
        for row in range(rows):
            yield {"image": encoded[row % PICTURES], "label": row % CLASSES}

    made = Dataset.from_generator(make, features=features, gen_kwargs={"rows": rows}, cache_dir=str(folder / "made"))
    made.save_to_disk(str(place))
    return place


def processor(images: list, return_tensors: str = "pt", **_: Any) -> dict[str, torch.Tensor]:
    """Levels as numbers of 0..1."""
    return {"pixel_values": torch.stack([torch.tensor(np.array(one)).permute(2, 0, 1) / 255 for one in images])}


def transform(batch: dict) -> dict:
    """What ``with_transform`` makes of some rows."""
    return {**processor(batch["image"]), "labels": batch["label"]}


def transform_one(row: dict) -> dict:
    """The same of one row of a stream."""
    return {"pixel_values": processor([row["image"]])["pixel_values"][0], "labels": row["label"]}


class Own(torch.utils.data.Dataset):
    """A user's own dataset over a table; it does not say what its labels are."""

    def __init__(self, table: Any):
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> dict:
        return transform_one(self.table[row])


def vision_rows(case: str, place: Path) -> Any:
    """The dataset of one case."""
    from datasets import load_from_disk

    from hf_immunize.data import preprocess

    table = load_from_disk(str(place))
    if case == "table with a transform":
        return table.with_transform(transform)
    if case == "stream":
        return table.to_iterable_dataset(num_shards=4).map(transform_one, remove_columns=["image", "label"])
    if case == "torch Dataset":
        return Own(table)
    names = [str(name) for name in range(CLASSES)]
    return preprocess(table, processor, label_names=names, name="rows", keep_bytes=0)


def tiny_vit(size: int) -> Any:
    """Random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(
        image_size=size, patch_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=CLASSES,
    ))


def attack_vision(place: Path, size: int, steps: int) -> None:
    """One run each of an attack that trains the network and of one that solves for a probe."""
    from hf_immunize.attacks import ATTACKS, AttackContext, Run

    tiny_vit(size).save_pretrained(place / "attacked")
    rows = vision_rows("recipes' preprocess", place)
    half = (len(rows) - 64) // 2
    attack, validation, test = map(rows.subset, torch.arange(len(rows)).split([64, half, len(rows) - 64 - half]))
    context = AttackContext(place / "attacked", "subject", attack, validation, test, data=())
    for name, config in (("full_finetune", {"steps": steps}), ("ridge_probe", {})):
        ((_, result),) = ATTACKS[name].run(context, [Run(ATTACKS[name].config(**config), "", 0)])
        assert result.outcome == "completed", result.note


def train_vision(case: str, place: Path, size: int, steps: int) -> None:
    """A few steps of the vision trainer."""
    from hf_immunize import ImmunizationConfig, ImmunizationTrainer

    if case == "attack":
        return attack_vision(place, size, steps)
    model = tiny_vit(size)
    args = ImmunizationConfig(
        tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=32, per_device_harmful_batch_size=64,
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1000,
    )
    rows = [vision_rows(case, place) for _ in range(2)]
    ImmunizationTrainer(model, args, train_dataset=rows[0], harmful_dataset=rows[1]).train()


def encoded_batches(rows: int, size: int = 100):
    """Latents and text conditions of random numbers, some rows at a time."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, rows, size):
        count = min(size, rows - start)
        yield (torch.randn(count, 4, SIDE, SIDE, generator=generator),
               torch.randn(count, TOKENS, WIDTH, generator=generator))


def train_diffusion(case: str, place: Path, rows: int, steps: int) -> None:
    """A few steps of the diffusion trainer, after writing what is not on disk yet."""
    import diffusers

    from hf_immunize.data import RowStore
    from hf_immunize.diffusion import LatentDataset
    from hf_immunize.training.diffusion import DiffusionImmunizationConfig, DiffusionImmunizationTrainer

    labels = torch.zeros(rows, dtype=torch.long)
    if case == "conditions on disk":
        store = RowStore.open_or_write(place, encoded_batches(rows), rows)
        made = LatentDataset.stored(store, ["encoder_hidden_states"], labels, ["concept"])
    else:
        latents, words = (torch.cat(parts) for parts in zip(*encoded_batches(rows), strict=True))
        made = LatentDataset(latents, {"encoder_hidden_states": words}, labels, ["concept"])
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDE, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        in_channels=4, out_channels=4, cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    args = DiffusionImmunizationConfig(
        tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=8, per_device_harmful_batch_size=8,
        logging_steps=1000, use_cpu=True, disable_progress=True, objective="condition_number",
    )
    DiffusionImmunizationTrainer(
        unet, diffusers.DDPMScheduler(), args, train_dataset=made, harmful_dataset=made.subset(torch.arange(64))
    ).train()


class Held(threading.Thread):
    """The most memory of its own that this process has held, MiB, mapped files left out."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most = 0.0

    def run(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            now = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.most = max(self.most, now / 1024)
            time.sleep(0.02)


def measured(arguments: argparse.Namespace, case: str, rows: int, place: Path) -> tuple[float, float]:
    """Peak memory of a process of its own, MiB: what it holds itself, and what is resident."""
    words = [sys.executable, __file__, "--run", case, "--place", str(place), "--rows", str(rows),
             "--size", str(arguments.size), "--steps", str(arguments.steps)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    held, resident = map(float, done.stdout.strip().splitlines()[-1].split())
    return held, resident


def main() -> None:
    """Print a table, a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 50_000])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--case", nargs="+", choices=[*VISION, *DIFFUSION], default=[*VISION, *DIFFUSION])
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.run:
        (rows,) = arguments.rows
        held = Held()
        held.start()
        if arguments.run in VISION:
            train_vision(arguments.run, arguments.place, arguments.size, arguments.steps)
        else:
            train_diffusion(arguments.run, arguments.place, rows, arguments.steps)
        print(held.most, highest_resident())
        return
    with tempfile.TemporaryDirectory() as folder:
        tables = {rows: write_table(Path(folder), rows, arguments.size) for rows in arguments.rows}
        print(f"peak memory in MiB, {arguments.steps} steps: held, resident, and float32 tensors of all rows")
        for case in arguments.case:
            told = []
            for rows in arguments.rows:
                vision = case in VISION
                numbers = 3 * arguments.size**2 if vision else 4 * SIDE**2 + TOKENS * WIDTH
                place = tables[rows] if vision else Path(folder) / f"encoded-{rows}"
                held, resident = measured(arguments, case, rows, place)
                told.append(f"{rows:,} rows {held:.0f}, {resident:.0f}, {rows * numbers * 4 / 2**20:.0f}")
            print(f"{case}: {'; '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
