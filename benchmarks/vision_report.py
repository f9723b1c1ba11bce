"""The tables and the figure of vision_transfer.py: docs/results/vision/*.json and *.png, Markdown on the screen.

python benchmarks/vision_report.py --results runs/vision
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from vision_attackers import Found, curve_rfd, signed_rfd, strongest
from vision_rows import FRONTIER, OURS, ROWS

from hf_immunize.records import atomic_write

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

OUT = Path(__file__).resolve().parents[1] / "docs" / "results" / "vision"
ATTACKERS = {"gradient_descent": "GD", "standardized_adam": "Adam, standardized", "ridge": "ridge"}
SPANS = {"rank_aware": "rank-aware", "paper": "paper-faithful"}


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Results by row, in the order of ROWS and FRONTIER, seeds together."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-seed*.json"))]
    known = [*ROWS, *(row for rows in FRONTIER.values() for row in rows)]
    return {row: mine for row in known if (mine := [one for one in found if one["row"] == row])}


def attackers(result: dict[str, Any], key: str) -> dict[str, Found]:
    """Attackers of one result as records; curves come back as lists of pairs."""
    return {name: Found(**{**one, "curve": tuple(map(tuple, one["curve"]))}) for name, one in result[key].items()}


def ratios(result: dict[str, Any], base: dict[str, Any], kind: str) -> tuple[float, float, float]:
    """(i), (ii) and RIR_theta0."""
    moved = {
        task: 10 ** (result["log10_kappa"][kind][task] - base["log10_kappa"][kind][task])
        for task in ("harmful", "primary")
    }
    return moved["harmful"], moved["primary"], moved["harmful"] / moved["primary"]


def mean_of(results: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    """Mean over seeds."""
    return fmean(value(result) for result in results)


def spread_of(results: list[dict[str, Any]], value: Callable[[dict[str, Any]], float], form: str) -> str:
    """Lowest and highest seed in brackets; nothing for one seed."""
    found = [value(result) for result in results]
    return f" [{min(found):{form}} to {max(found):{form}}]" if len(found) > 1 else ""


def main_table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Condition numbers, primary accuracy, and what every attacker reaches."""
    base = rows["init"][0]
    before, control = base["primary_accuracy"]["test"], attackers(base, "attackers")
    head = ["row", "seeds", "(i)", "(ii)", "RIR rank-aware", "RIR paper-faithful", "primary, %", "drop, points",
            *(f"{name}, % (RFD)" for name in ATTACKERS.values()), "best attacker, %", "RFD, %", "CPU s"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]

    def cell(results: list[dict[str, Any]], value: Callable[[dict[str, Any]], float], form: str) -> str:
        return f"{mean_of(results, value):{form}}" + spread_of(results, value, form)

    def rir(result: dict[str, Any]) -> float:
        return ratios(result, base, "rank_aware")[2]

    def drop(result: dict[str, Any]) -> float:
        return before - result["primary_accuracy"]["test"]

    def lost(result: dict[str, Any]) -> float:
        return signed_rfd(strongest(attackers(result, "attackers")), strongest(control))

    for row, results in rows.items():
        harmful, primary = (mean_of(results, lambda r, k=k: ratios(r, base, "rank_aware")[k]) for k in range(2))
        paper = mean_of(results, lambda r: ratios(r, base, "paper")[2])
        cells = [row, str(len(results)), f"{harmful:.3g}", f"{primary:.3g}", cell(results, rir, ".3g"), f"{paper:.3g}",
                 f"{before - mean_of(results, drop):.2f}", cell(results, drop, "+.2f")]  # fmt: skip
        for name in ATTACKERS:
            test = mean_of(results, lambda r, n=name: attackers(r, "attackers")[n].test)
            gone = mean_of(results, lambda r, n=name: signed_rfd(attackers(r, "attackers")[n], control[n]))
            cells.append(f"{100 * test:.1f} ({gone:.0f})")
        best = mean_of(results, lambda r: strongest(attackers(r, "attackers")).test)
        seconds = mean_of(results, lambda r: r["cpu_seconds"])
        cells += [f"{100 * best:.1f}", cell(results, lost, ".0f"), f"{seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curve_table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """RFD along the attacker's steps, other car classes, and fine-tuning of the same layers."""
    base = rows["init"][0]
    control, others = attackers(base, "attackers"), attackers(base, "other_classes")
    lines = ["| row | RFD along GD steps, % | RFD along Adam steps, % | other car classes, best attacker, % (RFD) |",
             "|---|---|---|---|"]  # fmt: skip
    for row, results in rows.items():
        along = [
            mean_of(results, lambda r, n=name: curve_rfd(attackers(r, "attackers")[n], control[n]))
            for name in ("gradient_descent", "standardized_adam")
        ]
        other = mean_of(results, lambda r: strongest(attackers(r, "other_classes")).test)
        lost = mean_of(results, lambda r: signed_rfd(strongest(attackers(r, "other_classes")), strongest(others)))
        lines.append(f"| {row} | {along[0]:.0f} | {along[1]:.0f} | {100 * other:.1f} ({lost:.0f}) |")
    tuned = {row: results[0]["fine_tuning"] for row, results in rows.items() if "fine_tuning" in results[0]}
    if tuned:
        steps = [step for step, _ in next(iter(tuned.values()))]
        head = " | ".join(["", "fine-tuning the same layers, accuracy after", *map(str, steps), ""]).strip()
        lines += ["", head, "|" + "---|" * (len(steps) + 1)]
        lines += [
            f"| {row} | " + " | ".join(f"{100 * accuracy:.1f}" for _, accuracy in curve) + " |"
            for row, curve in tuned.items()
        ]
    return "\n".join(lines)


def draw(tables: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Primary accuracy lost against signed RFD of the best attacker, one panel per backbone."""
    figure, axes = plt.subplots(1, len(tables), figsize=(6.4 * len(tables), 5.8), squeeze=False)
    for axis, (backbone, rows) in zip(axes[0], tables.items(), strict=True):
        base = rows["init"][0]
        control = strongest(attackers(base, "attackers"))
        for number, (row, results) in enumerate(rows.items(), 1):
            drop = mean_of(results, lambda r, b=base: b["primary_accuracy"]["test"] - r["primary_accuracy"]["test"])
            lost = mean_of(results, lambda r, c=control: signed_rfd(strongest(attackers(r, "attackers")), c))
            ours = row.startswith(OURS)
            look = {"color": "tab:red" if ours else "tab:blue", "marker": "o" if ours else "s"}
            axis.scatter(drop, lost, label=f"{number}  {row}", **look)
            axis.annotate(str(number), (drop, lost), textcoords="offset points", xytext=(5, 4), fontsize=8)
        axis.margins(x=0.15, y=0.1)
        axis.axvline(1.0, color="grey", lw=0.8, ls="--")
        axis.axhline(80.0, color="grey", lw=0.8, ls="--")
        axis.set(xlabel="primary accuracy lost, points (test)", title=backbone,
                 ylabel="signed RFD of the best attacker, % (test)")  # fmt: skip
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=2, fontsize=6.5, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default="runs/vision", help="output folder of vision_transfer.py")
    given = parser.parse_args()
    tables = {}
    OUT.mkdir(parents=True, exist_ok=True)
    for folder in sorted(path for path in Path(given.results).iterdir() if path.is_dir()):
        rows = read(folder)
        if "init" not in rows:
            continue
        tables[folder.name] = rows
        atomic_write(OUT / f"{folder.name}.json", json.dumps([one for mine in rows.values() for one in mine]) + "\n")
        if (checks := folder / "checks.json").exists():  # of vision_checks.py
            atomic_write(OUT / f"{folder.name}_checks.json", checks.read_text(encoding="utf-8"))
        print(f"\n### {folder.name}\n\n{main_table(rows)}\n\n{curve_table(rows)}")
    draw(tables, OUT / "frontier.png")


if __name__ == "__main__":
    main()
