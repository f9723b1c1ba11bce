"""Linear immunization from one YAML: load two tasks, run every method, write results.json and print the table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from hf_immunize.errors import ConfigError, ImmunizeError
from hf_immunize.linear import LinearImmunizer, LinearTask, load_house_prices, load_mnist, slant_labels
from hf_immunize.linear.experiment import markdown_table, run_methods, summarize
from hf_immunize.records import atomic_write

TASKS = ("house_prices", "mnist_pairs")
OPTIONS = {"task", "rows", "pairs", "seeds", "methods", "tolerance", "threads"}


def load_plan(path: str | Path) -> dict[str, Any]:
    """Read and check a stage file. Raises ConfigError for unknown keys, an unknown task or no methods."""
    plan = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    unknown = set(plan) - OPTIONS
    if unknown:
        raise ConfigError(f"expected keys from {sorted(OPTIONS)} in {Path(path).name}, got {sorted(unknown)}.")
    if plan.get("task") not in TASKS:
        raise ConfigError(f"expected task to be one of {TASKS}, got {plan.get('task')!r}.")
    if not plan.get("methods"):
        raise ConfigError(f"expected at least one method in {Path(path).name}, got none.")
    return {"seeds": [0], "rows": 200, "pairs": "all", "tolerance": None, "threads": 1, **plan}


def immunizers(plan: dict[str, Any], data_dir: str | None, dataset: str | None) -> Iterator[tuple[str, Any]]:
    """(label, LinearImmunizer) for each pair of tasks of the plan."""
    if plan["task"] == "house_prices":
        primary, harmful = load_house_prices(data_dir, dataset, rows=plan["rows"])
        yield (
            "house_prices",
            LinearImmunizer(
                primary.features,
                harmful.features,
                primary_labels=primary.labels,
                harmful_labels=harmful.labels,
                tolerance=plan["tolerance"],
            ),
        )
        return
    pixels, digits = load_mnist(data_dir, dataset)
    pairs = [(a, b) for a in range(10) for b in range(10) if a != b] if plan["pairs"] == "all" else plan["pairs"]
    tasks: dict[int, LinearTask] = {}
    for digit in sorted({digit for pair in pairs for digit in pair}):
        rows = pixels[digits == digit]
        tasks[digit] = LinearTask.of_features(rows, slant_labels(rows), tolerance=plan["tolerance"])
    for a, b in pairs:
        yield f"{a}-{b}", LinearImmunizer(tasks[a], tasks[b])


def run(
    plan: dict[str, Any], data_dir: str | None, dataset: str | None, progress: Path | None = None
) -> dict[str, Any]:
    """Every method on every pair; ``progress`` gets one JSON line per row, so that a long run can be watched."""
    torch.set_num_threads(plan["threads"])
    rows, limits = [], {}
    total = 1 if plan["task"] == "house_prices" else (90 if plan["pairs"] == "all" else len(plan["pairs"]))
    for label, immunizer in tqdm(immunizers(plan, data_dir, dataset), total=total, desc=plan["task"], unit="pair"):
        limits[label] = immunizer.limit.as_dict()
        for row in run_methods(immunizer, plan["methods"], plan["seeds"]):
            rows.append({"pair": label, **row})
            if progress is not None:
                with progress.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(rows[-1]) + "\n")
    return {"plan": plan, "limits": limits, "rows": rows, "summary": summarize(rows)}


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; exit status 2 for a request that cannot be met."""
    parser = argparse.ArgumentParser(description=__doc__, prog=prog)
    parser.add_argument("config", help="a linear.yaml")
    parser.add_argument("--data_dir", help="folder with D1.csv and D2.csv, or with mnist.npz")
    parser.add_argument("--dataset", help="instead of a folder: a datasets id, or a csv or parquet file")
    parser.add_argument("--output_dir", default="runs/linear", help="where results.json goes")
    given = parser.parse_args(arguments)
    try:
        plan, folder = load_plan(given.config), Path(given.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        progress = folder / "rows.jsonl"
        progress.unlink(missing_ok=True)
        results = run(plan, given.data_dir, given.dataset, progress)
        path = atomic_write(folder / "results.json", json.dumps(results, indent=1) + "\n")
    except ImmunizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown_table(results["summary"]))
    print(f"\nwritten: {path}")
    return 0

