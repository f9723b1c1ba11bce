"""What an exam says beside the verdict of each attack: families by budget, further measures, benign trainability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_immunize.records import Cell, Trainability, VerdictName
from hf_immunize.report import text
from hf_immunize.report.evidence import Evidence, attacks_by_family

_STRONGEST_FIRST: tuple[VerdictName, ...] = (
    "FAILS", "INCONCLUSIVE", "NOT RUN", "RESISTS", "NOTHING TO PROTECT", "NOT APPLICABLE",
)


def budget_shares(evidence: Sequence[Evidence]) -> list[float]:
    """Every part of a budget that some cell was judged on, ascending; at least the whole."""
    shares = {part.share for item in evidence for cell in item.certificate.cells for part in cell.budgets}
    return sorted(shares | {1.0})


def budget_matrix(evidence: Sequence[Evidence]) -> dict[str, Any]:
    """Families by models and parts of the budget: the verdict of the family's strongest attack on that part."""
    shares = budget_shares(evidence)
    return {
        "shares": [f"{100 * share:g}%" for share in shares],
        "rows": [
            {
                "family": family,
                "verdicts": [_strongest(item, attacks, share) for item in evidence for share in shares],
            }
            for family, attacks in attacks_by_family(evidence).items()
        ],
    }


def _strongest(item: Evidence, attacks: Sequence[str], share: float) -> VerdictName:
    cells = [cell for attack in attacks if (cell := item.cell(attack)) is not None]
    return min((_verdict_at(cell, share) for cell in cells), key=_STRONGEST_FIRST.index, default="NOT RUN")


def _verdict_at(cell: Cell, share: float) -> VerdictName:
    """The verdict on a part of the budget; the whole one's where the cell was not judged on parts."""
    return next((part.verdict for part in cell.budgets if part.share == share), cell.verdict)


def further(cell: Cell, metric: str = "accuracy") -> str:
    """Measures that the columns have no room for, as one line; empty for a cell without figures."""
    said = []
    if cell.worst_seed_slow_down is not None:
        said.append(f"worst seed {text.number(cell.worst_seed_slow_down, 2)}×")
    said += [
        f"at threshold {text.percent(found.threshold, 0)} {text.slow_down(found.slow_down)}"
        for found in cell.thresholds
    ]
    sides = [(label, side) for label, side in (("base", cell.control), ("immunized", cell.subject)) if side]
    for what, values in (
        (f"final {text.score_word(metric)}", [(label, text.mean(side.final)) for label, side in sides]),
        ("area under the curve", [(label, text.mean(side.area)) for label, side in sides]),
    ):
        known = [f"{label} {text.percent(value)}" for label, value in values if value is not None]
        if known and cell.unit == "step":
            said.append(f"{what} {', '.join(known)}")
    tries = [f"{label} {_tries(side.best_of_trials)}" for label, side in sides if len(side.best_of_trials) > 1]
    if tries:
        said.append(f"best of 1, 2, … trials {'; '.join(tries)}")
    if cell.samples is not None:
        said.append(f"up to {text.number(float(cell.samples))} rows and {text.number(cell.flops)} operations a run")
    return f"{'; '.join(said)[:1].upper()}{'; '.join(said)[1:]}." if said else ""


def _tries(values: Sequence[float]) -> str:
    """The curve at 1, 2, 4, … trials and at its end."""
    places = [place for place in range(len(values)) if (place + 1) & place == 0 or place == len(values) - 1]
    return " → ".join(text.percent(values[place], 0) for place in places)


_WORDS = {"EQUIVALENT": "resists", "WORSE": "fails", "INCONCLUSIVE": "inconclusive", "NOT RUN": "not-run"}


def trainability_rows(found: Sequence[Trainability]) -> list[dict[str, str]]:
    """One row per method by which the benign task was learned."""
    return [
        {
            "method": item.attack.removeprefix("benign_").replace("_", " ").replace("lora", "LoRA"),
            "verdict": item.verdict,
            "css": _WORDS[item.verdict],
            "accuracy": f"{text.percent(text.mean(item.base))} → {text.percent(text.mean(item.immunized))}"
            if item.base else text.NONE,
            "lost": text.points(item.drop),
            "slow_down": text.slow_down(item.slow_down) if item.base else text.NONE,
            "margin": f"±{100 * item.margin:.3g}",
        }
        for item in found
    ]
