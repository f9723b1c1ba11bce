"""All five methods on House Prices against the limit: table, JSON and the frontier figure.

    python benchmarks/linear_house_prices.py --data_dir <folder with D1.csv and D2.csv>

Writes docs/results/linear/house_prices.json and house_prices_frontier.png, prints the tables of docs/linear.md.
"""

from __future__ import annotations

import argparse
import json
import runpy
from pathlib import Path

import matplotlib
import numpy as np

from hf_immunize.linear import LinearImmunizer, load_house_prices
from hf_immunize.linear.experiment import markdown_table
from hf_immunize.records import Provenance, atomic_write

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "results" / "linear"
RECIPE = runpy.run_path(str(ROOT / "recipes" / "linear.py"))
MARKS = {"ill_only": "v", "imma": "s", "opt_kappa": "^", "algorithm1": "o", "algorithm1, clustered": "D"}


def frontier(data_dir: str | None, dataset: str | None, points: int = 25) -> list[dict[str, float]]:
    """(i), (ii) of the closed form over budgets 1 … κ(K_P), over the whole range."""
    primary, harmful = load_house_prices(data_dir, dataset)
    immunizer = LinearImmunizer(primary.features, harmful.features)
    found = []
    for budget in np.geomspace(1, immunizer.primary.factor.condition_number, points):
        right = immunizer.report(immunizer.closed_form(float(budget)).theta_DD).rank_aware
        found.append({"budget": float(budget), "harmful": right.harmful_ratio, "primary": right.primary_ratio})
    return found


def draw(results: dict, path: Path) -> None:
    """Two panels: κ over the whole ranges, where the ratio has no bound, and over the common range, where it has."""
    limit, rows = results["first_200"]["limits"]["house_prices"], results["first_200"]["rows"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=False)
    line = results["frontier"]
    x, y = [p["primary"] for p in line], [p["harmful"] for p in line]
    axes[0].plot(x, y, "k-", lw=1.5, label="closed form, budgets 1 … κ(K$_P$)")
    for name, mark in MARKS.items():
        mine = [row for row in rows if row["name"] == name]
        x, y = [r["primary_ratio"] for r in mine], [r["harmful_ratio"] for r in mine]
        axes[0].plot(x, y, mark, label=name, alpha=0.8)
        axes[1].plot([mark_x(name)] * len(mine), [r["common_rir"] for r in mine], mark, alpha=0.8)
    axes[0].plot([0.053], [18.92], "*", color="grey", ms=11, label="paper's Algorithm 1 (its own metric)")
    axes[0].set(xscale="log", yscale="log", xlabel="(ii)  κ(H$_P$) after / before — left is better",
                ylabel="(i)  κ(H$_H$) after / before — up is better",
                title="Whole ranges: harmful-only directions leave no bound")  # fmt: skip
    axes[0].axhline(1, color="grey", lw=0.6, ls=":")
    axes[0].axvline(1, color="grey", lw=0.6, ls=":")
    axes[0].legend(fontsize=7.5, loc="upper right")
    best = [r["common_rir"] for r in rows if r["method"] == "closed_form"]
    axes[1].plot([len(MARKS)], best, "k*", ms=11)
    axes[1].axhline(limit["ratio_limit"], color="k", lw=1, ls="--")
    axes[1].text(-0.3, limit["ratio_limit"] * 1.4, f"limit {limit['ratio_limit']:.3g}", fontsize=9)
    axes[1].set(yscale="log", ylabel="RIR on the common range", title="Common range: nobody passes the limit",
                ylim=(0.3, limit["ratio_limit"] * 6))  # fmt: skip
    axes[1].set_xticks(range(len(MARKS) + 1), [*MARKS, "closed form"], rotation=25, ha="right", fontsize=8)
    axes[1].set_xlim(-0.5, len(MARKS) + 0.5)
    figure.suptitle("House Prices, first 200 rows of each zone group; one mark per seed", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def mark_x(name: str) -> int:
    """Position of a method on the second panel."""
    return list(MARKS).index(name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir")
    parser.add_argument("--dataset")
    given = parser.parse_args()
    plan = RECIPE["load_plan"](ROOT / "recipes" / "linear-house-prices" / "linear.yaml")
    results = {
        "first_200": RECIPE["run"](plan, given.data_dir, given.dataset),
        "all_rows": RECIPE["run"]({**plan, "rows": None}, given.data_dir, given.dataset),
        "frontier": frontier(given.data_dir, given.dataset),
        "provenance": Provenance.here().model_dump(),
    }
    atomic_write(OUT / "house_prices.json", json.dumps(results, indent=1) + "\n")
    draw(results, OUT / "house_prices_frontier.png")
    for name in ("first_200", "all_rows"):
        limit = results[name]["limits"]["house_prices"]
        print(f"\n{name}: limit on the common range: RIR {limit['ratio_limit']:.4g}, κ* {limit['condition_limit']:.4g}")
        print(markdown_table(results[name]["summary"]))


if __name__ == "__main__":
    main()
