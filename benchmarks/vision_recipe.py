"""A vision recipe from its own stages, over heads and seeds: what probes of the last layer still reach.

    python benchmarks/vision_data.py --tiny_imagenet <zip> --stanford_cars <zip>
    python benchmarks/vision_recipe.py --recipe recipes/mobilenetv2-tiny-imagenet-stanford-cars \
        --model_name_or_path <folder> --processor_name_or_path <folder>

Starts recipes/pretrain.py, immunize.py and attack.py with the recipe's YAML files, as its README does, once per head
and seed, and trains by no other code: heads differ in how pretrain.py trains them. A stage that is done is kept, so
that the command can be interrupted and given again. Attackers choose on their validation images and are judged on test
images; primary accuracy is that of the primary test images. Prints the table and writes
docs/results/vision/<backbone>.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from hf_immunize.data import Task, TaskArguments, collate_pixels, for_model
from hf_immunize.metrics import best_trial, chosen_evaluation
from hf_immunize.models import load_classifier, load_processor
from hf_immunize.records import AttackTrace, ImmunizationRecord, Provenance, atomic_write
from hf_immunize.training.vision.frozen import FeatureCache, FrozenPart, collate_with_boundary, freeze_all_but

ROOT = Path(__file__).resolve().parents[1]
HEADS = {
    "recipe": (),
    "decayed": ("--learning_rate", "3e-4", "--weight_decay", "1"),
    "overfit": ("--learning_rate", "1e-2", "--num_train_epochs", "12"),
}
"""How a head is trained, on top of pretrain.yaml; weight norms differ by more than three times."""
OTHER = {"harmful_labels": ",".join(map(str, range(60, 80))), "harmful_splits": "attack=0.6,validation=0.15,test=0.25"}
"""Car classes that the defender never saw."""
PROBES = {"linear_probe_gd": "GD", "standardized_probe_adam": "Adam", "ridge_probe": "ridge"}


class Stages:
    """The recipe's stages in processes of their own, on the data and the weights that were named."""

    def __init__(self, given: argparse.Namespace):
        self.recipe, self.output = Path(given.recipe), Path(given.output) / Path(given.recipe).name
        self.objective: str = given.objective
        self.data = {"primary_dataset": given.primary_dataset, "harmful_dataset": given.harmful_dataset}
        names = ("model_name_or_path", "processor_name_or_path")
        self.model = [word for name in names if getattr(given, name) for word in (f"--{name}", getattr(given, name))]

    def run(self, script: str, config: str, *words: str) -> None:
        """One stage; its output goes to a log, whose end is shown where it fails."""
        command = [sys.executable, str(ROOT / "recipes" / f"{script}.py")]
        command += ["--config", str(self.recipe / "task.yaml"), "--config", str(self.recipe / config)]
        command += [word for name, value in self.data.items() for word in (f"--{name}", value)]
        self.output.mkdir(parents=True, exist_ok=True)
        log = self.output / "stages.log"
        with open(log, "a", encoding="utf-8") as stream:
            print(*command, *words, file=stream, flush=True)
            done = subprocess.run([*command, *words], stdout=stream, stderr=subprocess.STDOUT)
        if done.returncode:
            sys.exit(f"{script} failed, the end of {log}:\n" + "\n".join(log.read_text("utf-8").splitlines()[-15:]))

    def base(self, head: str) -> Path:
        """θ₀ with this head, attacked."""
        folder = self.output / head / "base"
        self.run("pretrain", "pretrain.yaml", "--output_dir", str(folder), *self.model, *HEADS[head])
        self._attack(folder, "control")
        return folder

    def immunized(self, head: str, seed: int) -> Path:
        """The immunized model of a head and seed, attacked."""
        folder = self.output / head / f"{self.objective}-seed{seed}"
        self.run(
            "immunize", f"{self.objective}.yaml", "--output_dir", str(folder), "--seed", str(seed),
            "--base_path", str(self.output / head / "base"),
        )
        self._attack(folder, "subject")
        return folder

    def _attack(self, folder: Path, role: str) -> None:
        """By the recipe's attackers, on the classes that were defended and on others."""
        words = ("--model_path", str(folder), "--role", role)
        self.run("attack", "attack.yaml", *words)
        others = [word for name, value in OTHER.items() for word in (f"--{name}", value)]
        self.run("attack", "attack.yaml", *words, *others, "--output_path", str(folder / "other"))

    def primary_accuracy(self, folder: Path) -> float:
        """Percent of the primary test images, computed once; what no run trains is run once for all of them."""
        kept = folder / "primary_test.json"
        if not kept.exists():
            model = load_classifier(folder)
            options = yaml.safe_load((self.recipe / "task.yaml").read_text(encoding="utf-8")) | self.data
            test = Task(TaskArguments(**options), "primary").pixels("test", load_processor(folder))
            rows = for_model(test, model.config.id2label)
            trained = yaml.safe_load((self.recipe / f"{self.objective}.yaml").read_text(encoding="utf-8"))
            freeze_all_but(model, trained["trainable_modules"])
            atomic_write(kept, json.dumps({"accuracy": _accuracy(model, rows), "rows": len(rows)}) + "\n")
        return float(json.loads(kept.read_text(encoding="utf-8"))["accuracy"])


@torch.no_grad()
def _accuracy(model: Any, rows: Any) -> float:
    frozen = FrozenPart(model, torch.as_tensor(rows[0]["pixel_values"]).shape)
    assert frozen.boundary is not None
    cached = FeatureCache(None, model, frozen.boundary, collate_pixels, "no").dataset(rows, rows.labels, "test")
    model.eval()
    hits = 0
    for batch in DataLoader(cached, 128, collate_fn=collate_with_boundary(collate_pixels)):
        labels = batch.pop("labels")
        with frozen.entered(model, batch) as plain:
            hits += int((model(**plain).logits.argmax(dim=1) == labels).sum())
    return 100 * hits / len(rows)


def reached(folder: Path, role: str) -> dict[str, dict[str, float]]:
    """By attack, the accuracy in percent at the trial and the step that its validation images chose."""
    traces = [AttackTrace.read(path) for path in sorted((folder / "traces" / role).glob("*.json"))]
    found = {}
    for attack in PROBES:
        mine = [trace for trace in traces if trace.attack == attack]
        trial = best_trial(mine)
        points = [point for trace in mine if trace.trial == trial and (point := chosen_evaluation(trace)) is not None]
        found[attack] = {
            split: 100 * fmean(getattr(point, split) for point in points) for split in ("validation", "test")
        }
    return found


def best_of(found: dict[str, dict[str, float]]) -> float:
    """Test accuracy of the attacker with the best validation accuracy."""
    return max(found.values(), key=lambda one: one["validation"])["test"]


def lost(before: float, after: float, chance: float) -> float:
    """Percent of the gain over chance that is gone."""
    return 100 * (before - after) / (before - chance)


def head_norm(folder: Path) -> float:
    """Frobenius norm of the classifier's weight."""
    weights = load_file(folder / "model.safetensors")
    return float(next(value for name, value in weights.items() if name.endswith("classifier.weight")).norm())


def row_of(stages: Stages, head: str, seed: int, classes: int) -> dict[str, Any]:
    """Everything the table shows of one immunized model."""
    base, folder = stages.base(head), stages.immunized(head, seed)
    record = ImmunizationRecord.read(folder / "immunization.json")
    assert record.outcome is not None
    result: dict[str, Any] = {
        "head": head, "seed": seed, "head_norm": head_norm(base), "told": record.outcome.told,
        "immunized": record.outcome.immunized, "seconds": record.seconds,
        "primary": {"before": stages.primary_accuracy(base), "after": stages.primary_accuracy(folder)},
    }
    for name, part, count in (("defended", "", classes), ("other", "other", 20)):
        before, after = reached(base / part, "control"), reached(folder / part, "subject")
        result[name] = {
            "before": before, "after": after, "best_before": best_of(before), "best_after": best_of(after),
            "lost": lost(best_of(before), best_of(after), 100 / count),
        }
    return result


def table(rows: Iterable[dict[str, Any]]) -> str:
    """One line per immunized model."""
    head = ["head (norm)", "seed", "primary, %", "drop", *(f"{name}, %" for name in PROBES.values()), "best, %",
            "gain lost, %", "unseen classes: best, %", "gain lost, %", "its last line"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        primary, mine, other = row["primary"], row["defended"], row["other"]
        probes = [f"{mine['before'][name]['test']:.1f} → {mine['after'][name]['test']:.1f}" for name in PROBES]
        cells = [f"{row['head']} ({row['head_norm']:.1f})", str(row["seed"])]
        cells += [f"{primary['before']:.2f} → {primary['after']:.2f}", f"{primary['before'] - primary['after']:+.2f}"]
        cells += [*probes, f"{mine['best_before']:.1f} → {mine['best_after']:.1f}", f"{mine['lost']:.0f}"]
        cells += [f"{other['best_before']:.1f} → {other['best_after']:.1f}", f"{other['lost']:.0f}"]
        lines.append("| " + " | ".join([*cells, row["told"].split(":")[0]]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="folder with the YAML files of the stages")
    parser.add_argument("--objective", default="closed_form_adversary", help="name of the YAML file of immunize.py")
    parser.add_argument("--heads", nargs="*", default=[*HEADS], choices=[*HEADS])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--model_name_or_path", help="as for pretrain.py; the recipe's by default")
    parser.add_argument("--processor_name_or_path", help="as for pretrain.py; the recipe's by default")
    parser.add_argument("--primary_dataset", default="runs/vision-data/tiny_imagenet.parquet")
    parser.add_argument("--harmful_dataset", default="runs/vision-data/stanford_cars.parquet")
    parser.add_argument("--output", default="runs/vision-recipe", help="folder for models, traces and logs")
    parser.add_argument("--results", default=str(ROOT / "docs" / "results" / "vision"), help="folder for the figures")
    given = parser.parse_args()
    stages = Stages(given)
    task = yaml.safe_load((stages.recipe / "task.yaml").read_text(encoding="utf-8"))
    classes = len(str(task["harmful_labels"]).split(","))
    path = Path(given.results) / f"{stages.recipe.name.split('-')[0]}.json"
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = {(row["head"], row["seed"]): row for row in known}
    for seed in given.seeds:
        for head in given.heads:
            rows[head, seed] = row_of(stages, head, seed, classes)
            print(table([rows[head, seed]]).splitlines()[-1], flush=True)
            ordered = [rows[key] for key in sorted(rows, key=lambda key: ([*HEADS].index(key[0]), key[1]))]
            found = {"objective": given.objective, "rows": ordered, "provenance": Provenance.here().model_dump()}
            atomic_write(path, json.dumps(found, indent=1) + "\n")
    print(f"\n{table(ordered)}")


if __name__ == "__main__":
    main()
