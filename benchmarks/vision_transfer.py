"""Tiny-ImageNet-200 to Stanford Cars on MobileNetV2 and DINOv2-small: every objective, every attacker, one table.

    python benchmarks/vision_data.py --tiny_imagenet tiny_imagenet_50.zip --stanford_cars stanford_cars_80_128.zip
    python benchmarks/vision_transfer.py --backbone mobilenetv2
    python benchmarks/vision_transfer.py --backbone dinov2
    python benchmarks/vision_report.py

A row that is on disk is not made again; --rows makes some rows only, --seeds more seeds. The first call of a backbone
trains the 200-class head on frozen features (theta_0). --model_path, --primary_dataset and --harmful_dataset take local
copies. What is chosen is chosen on validation images; the table is of test images. Writes <output>/<backbone>/*.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from vision_attackers import attack_all, fine_tune
from vision_rows import FRONTIER, OURS, ROWS, options_of
from vision_tail import BACKBONES, SPLIT_SEED, TailClassifier, features_of, load_split, load_tail, prepare

from hf_immunize.data import PixelDataset
from hf_immunize.linalg import second_moment_spectrum
from hf_immunize.records import Provenance, atomic_write
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer

HEAD_DECAYS = (3e-3, 1e-2, 3e-2, 1e-1)
FINE_TUNED = ("init", OURS)
"""Rows whose tail is also fine-tuned in full."""


def train_head(tail: TailClassifier, train: PixelDataset, validation: PixelDataset) -> float:
    """Softmax regression on standardized frozen features (AdamW, label smoothing 0.1); decay chosen on validation."""
    features, held = features_of(tail, train), features_of(tail, validation)
    mean, spread = features.mean(dim=0), features.std(dim=0) + 1e-6
    rows, judged = (features - mean) / spread, (held - mean) / spread
    best = (-1.0, torch.empty(0), torch.empty(0))
    for decay in HEAD_DECAYS:
        torch.manual_seed(0)
        layer = nn.Linear(rows.shape[1], tail.config.num_labels)
        optimizer = torch.optim.AdamW(layer.parameters(), 3e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.75)
        for _ in range(10):
            for part in torch.randperm(len(rows)).split(256):
                loss = nn.functional.cross_entropy(layer(rows[part]), train.labels[part], label_smoothing=0.1)
                loss = loss + decay / 2 * layer.weight.square().sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
        accuracy = float((layer(judged).argmax(dim=1) == validation.labels).double().mean())
        print(f"head: decay {decay:g}, validation accuracy {100 * accuracy:.2f}", flush=True)
        if accuracy > best[0]:
            weight = (layer.weight / spread).detach()
            best = (accuracy, weight, (layer.bias - weight @ mean).detach())
    tail.classifier.weight.data.copy_(best[1])
    tail.classifier.bias.data.copy_(best[2])
    return best[0]


def theta_0(name: str, folder: Path, model_path: str | None) -> TailClassifier:
    """The backbone's tail with its trained head, made once."""
    tail, path = load_tail(name, model_path), folder / "theta_0.safetensors"
    if path.exists():
        load_model(tail, path)
    else:
        train_head(tail, load_split(folder, "primary_train"), load_split(folder, "primary_validation"))
        save_model(tail, path)
    return tail


def defender_rows(folder: Path) -> PixelDataset:
    """Every harmful image the defender may see, mirrored ones included."""
    names = ["harmful_defense", "harmful_defense_mirrored"]
    parts = [load_split(folder, name) for name in names if (folder / f"{name}.safetensors").exists()]
    pixels, labels = (torch.cat([getattr(part, key) for part in parts]) for key in ("pixel_values", "labels"))
    return PixelDataset(pixels, labels, parts[0].label_names, "harmful defense")


def immunize(tail: TailClassifier, folder: Path, options: dict[str, Any], seed: int, work: Path) -> float:
    """Train the tail in place with ImmunizationTrainer; returns seconds of processor time."""
    args = ImmunizationConfig(output_dir=str(work), seed=seed, report_to="none", save_strategy="no", use_cpu=True,
                              logging_steps=50, disable_tqdm=True, feature_module="classifier", **options)  # fmt: skip
    trainer = ImmunizationTrainer(
        model=tail.train(),
        args=args,
        train_dataset=load_split(folder, "primary_train"),
        harmful_dataset=defender_rows(folder),
    )
    started = time.process_time()
    trainer.train()
    tail.eval()
    return time.process_time() - started


@torch.no_grad()
def accuracy(tail: TailClassifier, rows: PixelDataset) -> float:
    """Primary accuracy in percent."""
    logits = tail.classifier(features_of(tail, rows))
    return 100 * float((logits.argmax(dim=1) == rows.labels).double().mean())


def log_kappa(features: Tensor, kind: str) -> float:
    """log10 of the condition number of centred features: rank-aware, or as the paper's code computes it.

    ``paper``: the mean over 20 groups of 100 rows of σ_max/σ_min of ΦᵀΦ + 1e-6·I, σ_min the smallest above 1e-6
    (docs/method.md names what is wrong with it).
    """
    if kind == "rank_aware":
        return math.log10(second_moment_spectrum(features, feature_dtype=torch.float32).condition_number)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(20):
        group = features[torch.randperm(len(features), generator=generator)[:100]].double()
        values = torch.linalg.svdvals(group).square() + 1e-6
        values = torch.cat([values, values.new_full((max(0, group.shape[1] - 100),), 1e-6)])
        found.append(float(values[0] / values[values > 1e-6 * (1 + 1e-9)][-1]))
    return math.log10(sum(found) / len(found))


def measure(tail: TailClassifier, folder: Path) -> dict[str, Any]:
    """Everything the table shows of one model."""
    harmful = {role: load_split(folder, f"harmful_{role}") for role in ("defense", "attack", "validation", "test")}
    found = {role: features_of(tail, rows) for role, rows in harmful.items()}
    labels = {role: rows.labels for role, rows in harmful.items()}
    other = {role: load_split(folder, f"other_{role}") for role in ("attack", "validation", "test")}
    primary = features_of(tail, load_split(folder, "primary_train"))
    every = torch.cat([found["defense"], found["attack"]])
    return {
        "primary_accuracy": {
            role: accuracy(tail, load_split(folder, f"primary_{role}")) for role in ("validation", "test")
        },
        "log10_kappa": {
            kind: {"harmful": log_kappa(every, kind), "primary": log_kappa(primary, kind)}
            for kind in ("rank_aware", "paper")
        },
        "attackers": {name: asdict(one) for name, one in attack_all(found, labels).items()},
        "other_classes": {
            name: asdict(one)
            for name, one in attack_all(
                {role: features_of(tail, rows) for role, rows in other.items()},
                {role: rows.labels for role, rows in other.items()},
            ).items()
        },
    }


def make_row(row: str, seed: int, given: argparse.Namespace, folder: Path) -> None:
    """One row of the table, trained, attacked and written; nothing when it is on disk."""
    name = row.replace(", ", "_").replace(" ", "_").replace("=", "")
    path = folder / f"{name}-seed{seed}.json"
    if path.exists():
        return
    tail = theta_0(given.backbone, folder, given.model_path)
    options = options_of(row, given.backbone)
    seconds = immunize(tail, folder, options, seed, folder / "work") if row != "init" else 0.0
    result = {"row": row, "backbone": given.backbone, "seed": seed, "options": options, "cpu_seconds": seconds}
    result |= measure(tail, folder)
    if row in FINE_TUNED and seed == 0:
        splits = {role: load_split(folder, f"harmful_{role}") for role in ("attack", "test")}
        result["fine_tuning"] = fine_tune(tail, splits, rate=3e-4, steps=given.fine_tuning_steps, every=20)
    result["provenance"] = Provenance.here().model_dump()
    save_model(tail, folder / f"{name}-seed{seed}.safetensors")
    atomic_write(path, json.dumps(result) + "\n")
    best = {attacker: round(100 * one["test"], 1) for attacker, one in result["attackers"].items()}
    print(f"{row}: primary {result['primary_accuracy']}, harmful {best}, {seconds:.0f} s", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=sorted(BACKBONES), required=True)
    parser.add_argument("--model_path", help="folder with the backbone's weights; by default its Hub id")
    parser.add_argument("--primary_dataset", default="runs/vision-data/tiny_imagenet.parquet")
    parser.add_argument("--harmful_dataset", default="runs/vision-data/stanford_cars.parquet")
    parser.add_argument("--output", default="runs/vision", help="folder for activations, weights and results")
    more = [name for rows in FRONTIER.values() for name in rows]
    parser.add_argument("--rows", nargs="*", default=[*ROWS], help=f"default: {', '.join(ROWS)}; more: {more}")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--split_seed", type=int, default=SPLIT_SEED, help="of the content-hash splits")
    parser.add_argument("--fine_tuning_steps", type=int, default=120)
    given = parser.parse_args()
    if unknown := sorted({*given.rows} - {*ROWS, *FRONTIER[given.backbone]}):
        parser.error(f"expected rows of {[*ROWS, *FRONTIER[given.backbone]]}, got {unknown}.")
    logging.basicConfig(level=logging.WARNING)
    folder = Path(given.output) / given.backbone
    prepare(given.backbone, folder, given.model_path, given.primary_dataset, given.harmful_dataset, given.split_seed)
    for seed in given.seeds:
        for row in given.rows:
            make_row(row, seed, given, folder)


if __name__ == "__main__":
    main()
