"""Run a list of methods over seeds on one pair of tasks, and summarize: what recipes and benchmarks share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from hf_immunize.errors import ConfigError
from hf_immunize.linear.descent import METHODS
from hf_immunize.linear.immunizer import LinearImmunization, LinearImmunizer

MEASURED = (
    "harmful_ratio", "primary_ratio", "rir", "common_rir", "limit_fraction", "paper_harmful_ratio",
    "paper_primary_ratio", "paper_rir", "primary_loss_change", "harmful_loss_change", "seconds",
)  # fmt: skip


def run_method(immunizer: LinearImmunizer, method: str, options: dict[str, Any]) -> LinearImmunization:
    """One method by name. Raises ConfigError for an unknown name or option."""
    if method not in (*METHODS, "closed_form"):
        raise ConfigError(f"expected one of closed_form, {', '.join(METHODS)}, got {method!r}.")
    try:
        result: LinearImmunization = getattr(immunizer, method)(**options)
    except TypeError as error:
        raise ConfigError(f"expected options of {method}, got {sorted(options)}: {error}.") from error
    return result


def run_methods(
    immunizer: LinearImmunizer, methods: Iterable[dict[str, Any]], seeds: Iterable[int], *, losses: bool = True
) -> Iterator[dict[str, Any]]:
    """Yield one row of measurements per method and seed (closed_form has no seed and runs once).

    Each method is a mapping with ``method``, an optional ``name`` for the table, and that method's options.
    """
    for entry in methods:
        options = {key: value for key, value in entry.items() if key not in ("method", "name")}
        deterministic = entry["method"] == "closed_form"
        for seed in [None] if deterministic else list(seeds):
            given = options if seed is None else {**options, "seed": seed}
            result = run_method(immunizer, entry["method"], given)
            yield {
                "name": entry.get("name", entry["method"]),
                "method": entry["method"],
                "options": options,
                "seed": seed,
                **measure(immunizer, result, losses=losses),
            }


def measure(immunizer: LinearImmunizer, result: LinearImmunization, *, losses: bool = True) -> dict[str, Any]:
    """Everything the tables show about one extractor, as plain numbers; a loss that was not computed is None."""
    report = immunizer.report(result.theta_DD, losses=losses)
    right, paper = report.rank_aware, report.paper_faithful

    def change(after: float | None, before: float | None) -> float | None:
        return None if after is None or before is None else after / before - 1

    return {
        "harmful_ratio": right.harmful_ratio,
        "primary_ratio": right.primary_ratio,
        "rir": right.ratio,
        "ranks": right.ranks,
        "common_rir": report.common_ratio,
        "limit_rir": report.limit_ratio,
        "limit_fraction": report.limit_fraction,
        "paper_harmful_ratio": paper.harmful_ratio,
        "paper_primary_ratio": paper.primary_ratio,
        "paper_rir": paper.ratio,
        "primary_loss": report.primary_loss,
        "primary_loss_change": change(report.primary_loss, report.primary_loss_before),
        "harmful_loss_change": change(report.harmful_loss, report.harmful_loss_before),
        "seconds": result.seconds,
    }


def summarize(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, standard deviation, least and largest over rows of one name, in order of first appearance.

    The spread of a single row is None: one run says nothing about spread.
    """
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["name"], []).append(row)
    table = []
    for name, members in grouped.items():
        entry: dict[str, Any] = {"name": name, "runs": len(members)}
        for key in MEASURED:
            values = [row[key] for row in members if row[key] is not None and math.isfinite(row[key])]
            entry[key] = (
                {
                    "mean": statistics.fmean(values),
                    "sd": statistics.stdev(values) if len(values) > 1 else None,
                    "least": min(values),
                    "largest": max(values),
                    "finite": len(values),
                }
                if values
                else None
            )
        table.append(entry)
    return table


def markdown_table(table: Iterable[dict[str, Any]]) -> str:
    """The summary as a Markdown table; ± is the standard deviation over seeds."""

    def cell(entry: dict[str, Any], key: str) -> str:
        value = entry[key]
        if value is None:
            return "–"
        return f"{value['mean']:.4g}" if value["sd"] is None else f"{value['mean']:.4g} ± {value['sd']:.2g}"

    heads = ["method", "(i)", "(ii)", "RIR", "RIR, common range", "fraction of limit", "RIR, paper-faithful",
             "primary loss change", "s"]  # fmt: skip
    keys = ["harmful_ratio", "primary_ratio", "rir", "common_rir", "limit_fraction", "paper_rir",
            "primary_loss_change", "seconds"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join([entry["name"], *(cell(entry, key) for key in keys)]) + " |" for entry in table]
    return "\n".join(lines)
