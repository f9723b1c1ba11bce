"""What immunizing costs beside plain training: ratios of steps that take turns in one process, and how they grow.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py [--parts regularizer growth spectra wire step sites memory cache]
        [--sizes 128 224] [--before CHECKOUT]

Writes docs/results/vision/step_time.json after every part (parts that are not asked for keep what was there) and
prints the tables of docs/training.md. Networks have random weights and see random images: costs, and nothing else.

A step is all that happens between two ends of optimizer steps: loading, forward, backward, AdamW. Ours trains
32 primary + 32 harmful images by ``condition_number``; the stock ``transformers.Trainer`` trains the same number of
images as one batch of 64. The whole network trains in both; BatchNorm uses running statistics in both, as is our
default. CPU seconds of the process decide, so that neighbours on a shared machine do not; wall seconds stand beside.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from memory import highest_resident
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

from hf_immunize.data import PixelDataset
from hf_immunize.records import atomic_write
from hf_immunize.spectra import spectrum_record
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.training.core.meter import Meter
from hf_immunize.training.core.objective import GlobalObjective, MicroBatch
from hf_immunize.training.core.registry import OBJECTIVES, on_features, terms_of
from hf_immunize.training.core.terms import TermSettings

OUT = Path(__file__).resolve().parents[1] / "docs" / "results" / "vision" / "step_time.json"
ROWS, CLASSES = 32, 10
PARTS = ("regularizer", "growth", "spectra", "wire", "step", "sites", "memory", "cache")
AT_SITES = ("condition_number", "closed_form_adversary")
"""Objectives that are measured at what LoRA would train (``sites=lora``)."""


def network(kind: str, size: int) -> nn.Module:
    """ResNet18, ViT-S or ViT-L of random weights."""
    torch.manual_seed(0)
    if kind == "resnet18":
        shape = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
        return ResNetForImageClassification(ResNetConfig(**shape, layer_type="basic", num_labels=CLASSES))
    width, depth = {"vit_s": (384, 12), "vit_l": (1024, 24)}[kind]
    config = ViTConfig(
        image_size=size, hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64,
        intermediate_size=4 * width, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def images(rows: int, size: int, seed: int) -> PixelDataset:
    """Noise with labels that take turns."""
    pixels = torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return PixelDataset(pixels, torch.arange(rows) % CLASSES, [f"class {place}" for place in range(CLASSES)])


class Turns(TrainerCallback):
    """Lets two trainers in two threads take one step each, in turn, and keeps the CPU and wall seconds of each step."""

    def __init__(self, mine: threading.Semaphore, other: threading.Semaphore):
        self.mine, self.other = mine, other
        self.seconds: list[tuple[float, float]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Wait for the first turn."""
        self._wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the step and give the turn away."""
        now = time.process_time(), time.perf_counter()
        self.seconds.append((now[0] - self.start[0], now[1] - self.start[1]))
        self.other.release()
        self._wait()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """The other one may finish as well."""
        self.other.release()

    def _wait(self) -> None:
        self.mine.acquire()
        self.start = time.process_time(), time.perf_counter()


def _hold_norms(model: nn.Module) -> None:
    """BatchNorm stays in evaluation mode, as it does in an immunization step."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]


def _options(folder: str, steps: int, batch: int) -> dict[str, Any]:
    return {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": batch, "learning_rate": 1e-4,
        "report_to": "none", "save_strategy": "no", "logging_steps": 10_000, "disable_tqdm": True, "use_cpu": True,
    }


def ours(model: nn.Module, size: int, steps: int, turns: list[TrainerCallback], **options: Any) -> Trainer:
    """An immunization of the whole network, or of what ``options`` say."""
    settings = _options(tempfile.mkdtemp(), steps, ROWS) | {"per_device_harmful_batch_size": ROWS} | options
    args = ImmunizationConfig(**settings)
    data = images(2 * ROWS, size, 0), images(2 * ROWS, size, 1)
    return ImmunizationTrainer(model, args, train_dataset=data[0], harmful_dataset=data[1], callbacks=turns)


def stock(model: nn.Module, size: int, steps: int, turns: list[TrainerCallback]) -> Trainer:
    """Plain training on as many images a step."""
    _hold_norms(model)
    args = TrainingArguments(**_options(tempfile.mkdtemp(), steps, 2 * ROWS))
    return Trainer(model, args, train_dataset=images(2 * ROWS, size, 0), callbacks=turns)


def alternate(first: Any, second: Any, repeats: int, warm: int = 1) -> dict[str, Any]:
    """Seconds of the steps of two trainers (made by ``first`` and ``second``) in turn, and the ratio first / second."""
    gates = threading.Semaphore(0), threading.Semaphore(0)
    turns = Turns(gates[0], gates[1]), Turns(gates[1], gates[0])
    trainers = [make([turn]) for make, turn in zip((first, second), turns, strict=True)]
    for trainer in trainers:
        if isinstance(trainer, ImmunizationTrainer):
            trainer._measure_references()  # not part of a step; here, where nothing else runs
    threads = [threading.Thread(target=trainer.train) for trainer in trainers]
    for thread in threads:
        thread.start()
    gates[0].release()
    for thread in threads:
        thread.join()
    found: dict[str, Any] = {}
    for place, clock in enumerate(("cpu", "wall")):
        series = [[step[place] for step in turn.seconds[warm : warm + repeats]] for turn in turns]
        pairs = [a / b for a, b in zip(*series, strict=True)]
        found[clock] = {
            "seconds": [median(one) for one in series],
            "ratio": median(series[0]) / median(series[1]),
            "ratios_of_pairs": pairs,
        }
    return found


def step_part(options: argparse.Namespace, kind: str, size: int, **objective: Any) -> dict[str, Any]:
    """Our step over the stock step."""
    steps = options.repeats + 1
    return alternate(
        lambda turns: ours(network(kind, size), size, steps, turns, **objective),
        lambda turns: stock(network(kind, size), size, steps, turns),
        options.repeats,
    )


def cache_part(options: argparse.Namespace, kind: str, size: int, distillation: float) -> dict[str, Any]:
    """A step on images over a step on cached activations, last block trained.

    Of L blocks, L - 1 run forward once (a unit of work each) and the last one forward and backward (three units): the
    ratio is about (L - 1 + 3) / 3, 4.7 for ViT-S and 8.7 for ViT-L, whatever the cache costs.
    """
    steps = options.repeats + 1

    def make(turns: list[TrainerCallback], cached: bool) -> Trainer:
        return ours(
            network(kind, size), size, steps, turns, trainable_modules="last:1", distillation=distillation,
            cache_frozen_features=cached, feature_cache_dir=tempfile.mkdtemp(),
        )

    return alternate(lambda turns: make(turns, False), lambda turns: make(turns, True), options.repeats)


def objective_seconds(name: str, rows: int, width: int, sites: int = 1, repeats: int = 9) -> float:
    """CPU seconds of all that a step does between features and their gradients."""
    generator = torch.Generator().manual_seed(0)
    names = [f"site {place}" for place in range(sites)]
    batch = {
        side: {site: torch.randn(rows, width, generator=generator) for site in names} for side in ("primary", "harmful")
    }
    labels = torch.arange(rows) % CLASSES
    micro = MicroBatch(batch, {"primary": labels, "harmful": labels})  # type: ignore[arg-type]
    settings = TermSettings(harmful_classes=CLASSES)
    objective = GlobalObjective(
        terms_of(name), settings, dict.fromkeys(names, 1.0 / sites), weight="auto", strength=0.1, shares=None,
        bank_rows=0, meter=Meter(),
    )
    for weights in objective.weights.values():
        weights.reference = torch.ones((), dtype=torch.float64)
    seconds = []
    for _ in range(repeats + 2):
        start = time.process_time()
        objective.gradients([micro], spectra=False)
        seconds.append(time.process_time() - start)
    return median(seconds[2:])


def regularizer_part(_: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of every objective at 32 + 32 rows of 768 features."""
    return {name: 1e3 * objective_seconds(name, ROWS, 768) for name, terms in OBJECTIVES.items() if on_features(terms)}


def growth_part(_: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of two objectives over batch, width and number of sites."""
    found: dict[str, Any] = {}
    for name in ("condition_number", "closed_form_adversary"):
        found[name] = {
            "batch": {rows: 1e3 * objective_seconds(name, rows, 768) for rows in (32, 64, 128, 256, 512)},
            "width": {width: 1e3 * objective_seconds(name, 64, width) for width in (96, 192, 384, 768, 1536, 3072)},
            "sites": {sites: 1e3 * objective_seconds(name, 64, 384, sites) for sites in (1, 2, 4, 8, 16)},
        }
    return found


def spectra_part(_: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of a spectrum record of 8,000 rows of 512, and of the two decompositions of all rows it replaces."""
    rows = torch.randn(8000, 512, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(len(rows)) % CLASSES
    centred = rows.double() - rows.double().mean(dim=0)

    def before() -> None:
        for _ in ("spectrum", "steps"):
            torch.linalg.svd(centred, full_matrices=False)

    found = {}
    for name, run in (
        ("record", lambda: spectrum_record(rows, labels, site="head", task="harmful")), ("two SVDs of all rows", before)
    ):
        seconds = []
        for _ in range(3):
            start = time.process_time()
            run()
            seconds.append(time.process_time() - start)
        found[name] = median(seconds)
    return found


def wire_part(options: argparse.Namespace) -> dict[str, Any]:
    """Collectives, read-backs and CPU seconds of the objective at 280 sites on two processes; see wire.py."""

    def run(package: Path) -> dict[str, Any]:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        script = str(Path(__file__).with_name("wire.py"))
        surroundings = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *words, script, *AT_SITES], capture_output=True, text=True, check=True, env=surroundings
        )
        return dict(json.loads(done.stdout.splitlines()[-1]))

    found = {"now": run(Path(__file__).resolve().parents[1])}
    return found | ({"before": run(options.before.resolve())} if options.before else {})


def peak(kind: str, size: int, which: str) -> None:
    """Print the peak memory of a process that takes three steps, and what it held before them, in MiB."""
    make = {"ours": ours, "stock": stock}[which]
    trainer = make(network(kind, size), size, 3, [])
    before = highest_resident()
    trainer.train()
    print(json.dumps([highest_resident(), before]))


def memory_part(kind: str, size: int) -> dict[str, Any]:
    """Peak memory of our step over the stock step, a process each: of the whole process, and above its start.

    With glibc's threshold for handing freed memory back held at its default: by itself it grows to 32 MiB, and then
    the peak is that of a heap's holes, which depend on whether a layer's activations lie above or below that.
    """
    found = {}
    surroundings = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
    for which in ("ours", "stock"):
        words = [sys.executable, __file__, "--peak", kind, str(size), which]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=surroundings)
        found[which] = json.loads(done.stdout.splitlines()[-1])
    (ours_peak, ours_before), (stock_peak, stock_before) = found["ours"], found["stock"]
    return {
        "mebibytes": {"ours": ours_peak, "stock": stock_peak},
        "ratio": ours_peak / stock_peak,
        "above_start": {"ours": ours_peak - ours_before, "stock": stock_peak - stock_before},
        "ratio_above_start": (ours_peak - ours_before) / (stock_peak - stock_before),
    }


def keep(part: str, name: str | None, value: Any) -> None:
    """Put one result into the JSON file and leave the others as they are."""
    found = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
    if name is None:
        found[part] = value
    else:
        found.setdefault(part, {})[name] = value
    found["machine"] = {
        "processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__.split("+")[0],
    }
    atomic_write(OUT, json.dumps(found, indent=1) + "\n")


def wire_table(found: dict[str, Any]) -> list[str]:
    """Lines about 280 sites; with an older checkout's figures, both and their ratio."""
    lines = ["", "| 280 sites, 2 processes | collectives | read-backs | CPU s |", "|---|---|---|---|"]
    for name, now in found["now"].items():
        before = found.get("before", {}).get(name)
        cells = [f"{now['collectives']}", f"{now['read_backs']}", f"{now['seconds']:.2f}"]
        if before:
            old = [f"{before['collectives']}", f"{before['read_backs']}", f"{before['seconds']:.2f}"]
            cells = [f"{a} → {b}" for a, b in zip(old, cells, strict=True)]
            cells[-1] += f" (÷ {before['seconds'] / now['seconds']:.1f})"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def table(found: dict[str, Any]) -> str:
    """The Markdown tables of docs/training.md."""
    lines = ["| step | ours, s | stock, s | ratio (CPU) | ratio (wall) |", "|---|---|---|---|---|"]
    for name, row in (found.get("step", {}) | found.get("sites", {})).items():
        first, second = row["cpu"]["seconds"]
        ratios = f"{row['cpu']['ratio']:.3f} | {row['wall']['ratio']:.3f}"
        lines.append(f"| {name} | {first:.2f} | {second:.2f} | {ratios} |")
    lines += ["", "| peak memory | ours, MiB | stock, MiB | ratio | ratio above start |", "|---|---|---|---|---|"]
    for name, row in found.get("memory", {}).items():
        held = row["mebibytes"]
        lines.append(
            f"| {name} | {held['ours']:.0f} | {held['stock']:.0f} | {row['ratio']:.3f} | "
            f"{row['ratio_above_start']:.3f} |"
        )
    lines += ["", "| last block trains | on images, s | cached, s | ratio (CPU) |", "|---|---|---|---|"]
    for name, row in found.get("cache", {}).items():
        first, second = row["cpu"]["seconds"]
        lines.append(f"| {name} | {first:.2f} | {second:.3f} | {row['cpu']['ratio']:.1f} |")
    if "wire" in found:
        lines += wire_table(found["wire"])
    if "spectra" in found:
        lines += ["", "| spectrum of 8,000 rows of 512 | CPU s |", "|---|---|"]
        lines += [f"| {name} | {value:.2f} |" for name, value in found["spectra"].items()]
    lines += ["", "| objective, 32 + 32 rows of 768 | ms |", "|---|---|"]
    lines += [f"| {name} | {value:.1f} |" for name, value in found.get("regularizer", {}).items()]
    for name, axes in found.get("growth", {}).items():
        lines += ["", f"{name}: ms over"]
        lines += [
            f"- {axis} " + ", ".join(f"{at}: {value:.1f}" for at, value in values.items())
            for axis, values in axes.items()
        ]
    return "\n".join(lines)


def main() -> None:
    """Measure the parts asked for, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "vit_s"])
    parser.add_argument("--cached", nargs="+", default=["vit_s"], help="networks of the part cache; vit_l takes long")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 224])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--before", type=Path, help="checkout of an older version, measured too by the part wire")
    parser.add_argument("--peak", nargs=3, metavar=("NETWORK", "SIZE", "WHICH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    if options.peak:
        peak(options.peak[0], int(options.peak[1]), options.peak[2])
        return
    if "regularizer" in options.parts:
        keep("regularizer", None, regularizer_part(options))
    if "growth" in options.parts:
        keep("growth", None, growth_part(options))
    if "spectra" in options.parts:
        keep("spectra", None, spectra_part(options))
    if "wire" in options.parts:
        keep("wire", None, wire_part(options))
    for size in options.sizes:
        for kind in options.networks:
            name = f"{kind}, {size} px"
            if "step" in options.parts:
                keep("step", name, step_part(options, kind, size))
            for objective in AT_SITES if "sites" in options.parts and kind.startswith("vit") else ():
                at_sites = step_part(options, kind, size, objective=objective, sites="lora")
                keep("sites", f"{name}, {objective} at sites=lora", at_sites)
            if "memory" in options.parts:
                keep("memory", name, memory_part(kind, size))
        for kind in options.cached if "cache" in options.parts else ():
            for distillation in (0.0, 1.0):
                name = f"{kind}, {size} px" + (", distilled" if distillation else "")
                keep("cache", name, cache_part(options, kind, size, distillation))
    print(table(json.loads(OUT.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
