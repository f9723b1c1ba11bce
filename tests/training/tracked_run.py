"""A tiny run under a tracker, as a process: ``tracked_run.py TRACKER FOLDER`` prints what the tracker holds."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_immunize.data import PixelDataset
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer

PROJECT, STEPS = "immunization", 6
Held = dict[str, dict[int, float]]


def rows(count: int, seed: int) -> PixelDataset:
    pixels = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(count) % 3
    return PixelDataset(pixels + labels[:, None, None, None], labels, ["a", "b", "c"])


def train(tracker: str, folder: Path) -> ImmunizationTrainer:
    """Six steps with guard, spectra and probe, all of them logged."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2,
                                                num_attention_heads=2, intermediate_size=32, num_labels=3))
    args = ImmunizationConfig(
        str(folder / "run"), objective="closed_form_adversary", max_steps=STEPS, per_device_train_batch_size=8,
        per_device_harmful_batch_size=24, learning_rate=1e-2, report_to=tracker, save_strategy="no", strength=30.0,
        logging_steps=2, probe_steps=3, max_primary_drop=100.0, eval_steps=3, disable_tqdm=True, use_cpu=True, seed=7,
        horizon="30", run_name="tiny", project=PROJECT,
    )  # fmt: skip
    trainer = ImmunizationTrainer(
        model=model, args=args, train_dataset=rows(24, 0), harmful_dataset=rows(48, 1),
        harmful_eval_dataset=rows(48, 2), eval_dataset=rows(24, 3),
    )
    trainer.train()
    return trainer


def by_tag(logs: list[dict[str, Any]]) -> Held:
    """Every number that was logged, by tag and step."""
    found: Held = {}
    for entry in logs:
        step = int(entry["train/global_step"])
        for tag, value in entry.items():
            if tag != "train/global_step" and isinstance(value, int | float):
                found.setdefault(tag, {})[step] = float(value)
    return found


def held_by_trackio(folder: Path) -> Held:
    """Of the database that trackio keeps on disk."""
    from trackio.sqlite_storage import SQLiteStorage

    return by_tag(SQLiteStorage.get_logs(PROJECT, "tiny"))


def held_by_wandb(folder: Path) -> Held:
    """Of the file that ``wandb sync`` would send: a header of 7 bytes, then records in the manner of LevelDB's log, cut
    at blocks of 32 KiB (checksum, length, kind: 1 whole, 2 first, 3 middle, 4 last)."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.finish()
    (path,) = folder.rglob("run-*.wandb")
    data, place, part, logs = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            items = Record.FromString(part).history.item
            entry = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            logs += [entry] if "train/global_step" in entry else []
            part = b""
    return by_tag(logs)


def main(tracker: str, folder: Path) -> None:
    outcome = train(tracker, folder).outcome
    held = {"wandb": held_by_wandb, "trackio": held_by_trackio}[tracker](folder)
    print(json.dumps({"held": held, "before": outcome.probe_before, "after": outcome.probe_after}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
