"""All five methods on the 90 ordered MNIST pairs: table, JSON and the heat map of log10 RIR (Fig. 2 of the paper).

    python benchmarks/linear_mnist.py --data_dir <folder with mnist.npz>
    python benchmarks/linear_mnist.py --data_dir <folder> --results runs/linear-mnist/results.json

The first form takes about half an hour on one core; the second reads what recipes/linear.py wrote and only measures
the time of the closed form again. Writes docs/results/linear/mnist_pairs.json and
mnist_pairs.png, prints the tables of docs/linear.md.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch

from hf_immunize.linear import LinearImmunizer, LinearTask, load_mnist
from hf_immunize.linear.experiment import markdown_table
from hf_immunize.records import Provenance, atomic_write

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "results" / "linear"
RECIPE = runpy.run_path(str(ROOT / "recipes" / "linear.py"))
PANELS = ("ill_only", "imma", "opt_kappa", "algorithm1", "closed_form")
KEPT = ("pair", "name", "seed", "harmful_ratio", "primary_ratio", "rir", "ranks", "common_rir", "limit_rir",
        "limit_fraction", "paper_rir", "primary_loss", "primary_loss_change", "harmful_loss_change",
        "seconds")  # fmt: skip


def counts(rows: list[dict]) -> list[dict]:
    """Per method, how many pairs pass each line, and medians: means of ratios over decades say little."""
    table = []
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        table.append(
            {
                "name": name,
                "pairs": len(mine),
                "rir_above_1": sum(row["rir"] > 1 for row in mine),
                "common_rir_above_1": sum(row["common_rir"] > 1 for row in mine),
                "definition_3_1": sum(row["harmful_ratio"] > 1 and row["primary_ratio"] <= 1 for row in mine),
                "limit_reached_99": sum(row["limit_fraction"] >= 0.99 for row in mine),
                "median_rir": statistics.median(row["rir"] for row in mine),
                "median_common_rir": statistics.median(row["common_rir"] for row in mine),
                "median_paper_rir": statistics.median(row["paper_rir"] for row in mine),
                "largest_loss_change": max(abs(row["primary_loss_change"]) for row in mine),
                "largest_seconds": max(row["seconds"] for row in mine),
                "median_seconds": statistics.median(row["seconds"] for row in mine),
            }
        )
    return table


def counts_table(table: list[dict]) -> str:
    """The counts as Markdown."""
    lines = ["| method | RIR > 1 | common-range RIR > 1 | (i) > 1 and (ii) ≤ 1 | ≥ 0.99 of the limit | median RIR | "
             "median common-range RIR | median paper-faithful RIR | largest primary loss change | median s |",
             "|" + "---|" * 10]  # fmt: skip
    for entry in table:
        of = entry["pairs"]
        lines.append(
            f"| {entry['name']} | {entry['rir_above_1']}/{of} | {entry['common_rir_above_1']}/{of} | "
            f"{entry['definition_3_1']}/{of} | {entry['limit_reached_99']}/{of} | {entry['median_rir']:.3g} | "
            f"{entry['median_common_rir']:.3g} | {entry['median_paper_rir']:.3g} | "
            f"{entry['largest_loss_change']:.1e} | {entry['median_seconds']:.2g} |"
        )
    return "\n".join(lines)


def closed_form_seconds(data_dir: str | None, dataset: str | None) -> dict[str, float]:
    """Wall and CPU seconds of the closed form alone, over all pairs, on two threads; factors are per digit."""
    torch.set_num_threads(2)
    pixels, digits = load_mnist(data_dir, dataset)
    tasks, factor = [], []
    for digit in range(10):
        started = time.perf_counter()
        tasks.append(LinearTask.of_features(pixels[digits == digit]))
        factor.append(time.perf_counter() - started)
    wall, cpu = [], []
    for first in range(10):
        for second in (digit for digit in range(10) if digit != first):
            immunizer = LinearImmunizer(tasks[first], tasks[second])
            started, used = time.perf_counter(), time.process_time()
            immunizer.closed_form()
            wall.append(time.perf_counter() - started)
            cpu.append(time.process_time() - used)
    return {
        "factor_wall_median": statistics.median(factor),
        "factor_wall_largest": max(factor),
        "closed_form_wall_median": statistics.median(wall),
        "closed_form_wall_largest": max(wall),
        "closed_form_cpu_median": statistics.median(cpu),
        "closed_form_cpu_largest": max(cpu),
        "load_average": os.getloadavg()[0],
    }


def draw(rows: list[dict], path: Path) -> None:
    """One heat map per method: log10 of the common-range RIR, where the limit theorem holds."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(19, 4.3))
    for axis, name in zip(axes, PANELS, strict=True):
        grid = np.full((10, 10), np.nan)
        for row in rows:
            if row["name"] == name:
                primary, harmful = (int(digit) for digit in row["pair"].split("-"))
                grid[primary, harmful] = np.log10(row["common_rir"])
        image = axis.imshow(grid, cmap="viridis" if np.nanmin(grid) > 0 else "coolwarm")
        if np.nanmin(grid) <= 0:
            image.set_clim(-np.nanmax(np.abs(grid)), np.nanmax(np.abs(grid)))
        for (i, j), value in np.ndenumerate(grid):
            if np.isfinite(value):
                axis.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=6.5, color="white"
                          if image.norm(value) < 0.55 and np.nanmin(grid) > 0 else "black")  # fmt: skip
        axis.set(xticks=range(10), yticks=range(10), xlabel="harmful digit", title=name)
        figure.colorbar(image, ax=axis, fraction=0.046)
    axes[0].set_ylabel("primary digit")
    figure.suptitle("log10 RIR on the common range, 90 ordered MNIST pairs (each panel has its own scale)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir")
    parser.add_argument("--dataset")
    parser.add_argument("--results", help="results.json of recipes/linear.py, instead of running it")
    given = parser.parse_args()
    if given.results:
        results = json.loads(Path(given.results).read_text(encoding="utf-8"))
    else:
        plan = RECIPE["load_plan"](ROOT / "recipes" / "linear-mnist-pairs" / "linear.yaml")
        results = RECIPE["run"](plan, given.data_dir, given.dataset)
    rows = [{key: row[key] for key in KEPT} for row in results["rows"]]
    table = counts(rows)
    seconds = closed_form_seconds(given.data_dir, given.dataset)
    written = {"plan": results["plan"], "counts": table, "closed_form_seconds": seconds,
               "limits": results["limits"], "rows": rows, "provenance": Provenance.here().model_dump()}  # fmt: skip
    atomic_write(OUT / "mnist_pairs.json", json.dumps(written) + "\n")
    draw(rows, OUT / "mnist_pairs.png")
    print(counts_table(table))
    limits = list(results["limits"].values())
    harder = sum(limit["whole_range_ratio"] > 1 for limit in limits)
    print(f"\nwith budget κ(K_P) the closed form has (ii) = 1 and (i) > 1 on {harder}/{len(limits)} pairs")
    print("\n".join(f"{name}: {value:.3g}" for name, value in seconds.items()) + "\n")
    print(markdown_table(results["summary"]))


if __name__ == "__main__":
    main()
