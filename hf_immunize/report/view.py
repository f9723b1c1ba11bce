"""From evidence to what the page's template prints: every figure already a string or a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup

from hf_immunize.records import Cell, FamilyVerdict, Side, SpectrumRecord
from hf_immunize.report import charts, text
from hf_immunize.report.charts import BASE, SCRATCH, Curves, SpectrumLine, Strip, Style, style_of
from hf_immunize.report.evidence import Evidence, attacks_by_family
from hf_immunize.report.exam import budget_matrix, further, trainability_rows
from hf_immunize.report.gallery import galleries
from hf_immunize.report.likeness import frechet_words, gap_rows

BASE_LABEL = "Base"
SCRATCH_LABEL = "From scratch"


@dataclass(frozen=True)
class Figure:
    """A chart with its heading and the lines of its caption; ``chart`` is None where there is nothing to draw."""

    title: str
    family: str
    chart: Markup | None
    lines: Sequence[dict[str, Any]]


def page(evidence: Sequence[Evidence]) -> dict[str, Any]:
    """The whole context of ``page.html.jinja``."""
    first = evidence[0].certificate
    return {
        "base": first.control,
        "models": [_model(item, index) for index, item in enumerate(evidence)],
        "legend": legend(evidence, _any_scratch(evidence)),
        "spectra_legend": legend(evidence, scratch=False),
        "matrix": matrix(evidence),
        "budgets": budget_matrix(evidence),
        "utility": utility_chart(evidence),
        "figures": figures(evidence),
        "spectra": spectrum_figures(evidence),
        "explanations": explanations(evidence),
        "rules": _distinct([(item.label, item.certificate.rule) for item in evidence]),
        "threshold_rules": _distinct([(item.label, item.certificate.threshold_rule) for item in evidence]),
        "not_run": _distinct([(item.label, tuple(item.certificate.not_run)) for item in evidence]),
        "data": [*first.primary_data, *first.harmful_data, *first.benign_data],
        "control_differs": control_differs(evidence),
        "level": f"{100 * first.utility.drop.level:g}%",
        "metric": first.harmful_metric,
        "score": text.score_word(first.harmful_metric),
        "galleries": galleries(evidence),
        "gaps": [{"model": item.label, **row} for item in evidence for row in gap_rows(item.certificate)],
        "words": words,
        "sentence": sentence,
    }


def _distinct(said: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """What is the same for every model is said once, without a name."""
    values = {value for _, value in said}
    return [("", said[0][1])] if len(values) == 1 else list(said)


def _any_scratch(evidence: Sequence[Evidence]) -> bool:
    return any(cell.scratch for item in evidence for cell in item.certificate.cells)


def legend(evidence: Sequence[Evidence], scratch: bool) -> list[dict[str, Any]]:
    """The look of every model."""
    rows = [(BASE_LABEL, BASE), *((item.label, style_of(index)) for index, item in enumerate(evidence))]
    if scratch:
        rows.append((SCRATCH_LABEL, SCRATCH))
    return [{"label": label, "swatch": charts.swatch(style)} for label, style in rows]


def _model(item: Evidence, index: int) -> dict[str, Any]:
    certificate = item.certificate
    guard = item.immunization.guard if item.immunization else None
    return {
        "label": item.label,
        "swatch": charts.swatch(style_of(index)),
        "certificate": certificate,
        "immunization": item.immunization,
        "guard": guard,
        "drop": text.points(certificate.utility.drop, 1.0),
        "beside": [
            {"metric": item.metric, "base": f"{item.base:.1f}%", "immunized": f"{item.immunized:.1f}%",
             "drop": text.points(item.drop, 1.0), "rows": f"{item.rows:,}"}
            for item in certificate.further_utility
        ],
        "frechet": frechet_words(certificate),
        "has_ratio": bool(certificate.spectra),
        "trainability": trainability_rows(certificate.trainability),
        "rows": [cell_row(cell, certificate.harmful_metric) for cell in certificate.cells],
        "absent": [cell for cell in certificate.cells if cell.verdict in ("NOT RUN", "NOT APPLICABLE")],
        "has_resistance": any(cell.normalized_resistance or cell.scratch for cell in certificate.cells),
        "ratio": text.ratio(certificate),
        "harmful_part": text.number(certificate.immunization_ratio_parts.get("harmful")),
        "primary_part": text.number(certificate.immunization_ratio_parts.get("primary")),
        "fingerprint": (item.label, certificate.subject),
        "runs": len(item.traces),
        "diverged": sum(run.outcome == "diverged" for run in item.traces),
        "seconds": text.number(sum(run.seconds for run in item.traces)),
        "unlisted": item.unlisted,
    }


def matrix(evidence: Sequence[Evidence]) -> list[dict[str, Any]]:
    """Families with their verdicts, and below each its attacks, one entry per model."""
    return [
        {
            "family": family,
            "verdicts": [_family_verdict(item.certificate.families, family) for item in evidence],
            "attacks": [
                {"attack": words(attack), "cells": [
                    _matrix_cell(item.cell(attack), item.certificate.harmful_metric) for item in evidence
                ]}
                for attack in attacks
            ],
        }
        for family, attacks in attacks_by_family(evidence).items()
    ]


_SPELLED = {
    "adam": "Adam", "gd": "GD", "sgd": "SGD", "lbfgs": "L-BFGS",
    "lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "ia3": "IA³",
}


def words(key: str) -> str:
    """An attack's key as words."""
    return " ".join(_SPELLED.get(word, word) for word in key.split("_"))


def sentence(said: str) -> str:
    """Free text with a capital letter and one full stop."""
    said = said.strip().rstrip(".")
    return f"{said[:1].upper()}{said[1:]}." if said else ""


def _family_verdict(families: Sequence[FamilyVerdict], family: str) -> str:
    return next((item.verdict for item in families if item.family == family), "NOT RUN")


def _matrix_cell(cell: Cell | None, metric: str = "accuracy") -> dict[str, Any]:
    if cell is None:
        return {"verdict": "NOT RUN", "effect": "not in this model's exam", "accuracies": ""}
    if cell.subject is None or cell.control is None:
        return {"verdict": cell.verdict, "effect": "", "accuracies": ""}
    figure = text.slow_down(cell.slow_down)
    effect = "closed form" if cell.unit == "solve" else "no slow-down figure" if figure == "no figure" else figure
    return {"verdict": cell.verdict, "effect": effect, "accuracies": _both(cell, 0 if metric == "accuracy" else 1)}


def _both(cell: Cell, digits: int) -> str:
    """Score of the attack on base and on immunized model."""
    before, after = text.accuracy(cell.control), text.accuracy(cell.subject)
    if before is None and after is None:
        return "every run diverged"
    return f"{text.percent(before, digits)} → {text.percent(after, digits)}"


def utility_chart(evidence: Sequence[Evidence]) -> Markup:
    """Primary metric of the base and of each model, its interval being that of the paired drop."""
    first = evidence[0].certificate.utility
    rows = [Strip(BASE_LABEL, BASE, first.base)]
    for index, item in enumerate(evidence):
        utility = item.certificate.utility
        high, low = utility.drop.low, utility.drop.high
        rows.append(Strip(
            item.label, style_of(index), utility.immunized,
            low=None if low is None else utility.base - low,
            high=None if high is None else utility.base - high,
        ))
    metric = text.clean(first.metric)
    label = f"Primary {metric if len(metric) <= 20 else 'metric'}, % (axis cut to the data)"  # or it leaves the picture
    return charts.strips("Primary metric, base and immunized", rows, label, zoom=True)


def figures(evidence: Sequence[Evidence]) -> list[Figure]:
    """One figure per attack: learning curves, or accuracies where the attack is a closed-form solution."""
    return [
        _figure(evidence, family, attack)
        for family, attacks in attacks_by_family(evidence).items()
        for attack in attacks
    ]


def _figure(evidence: Sequence[Evidence], family: str, attack: str) -> Figure:
    cells = [cell for item in evidence if (cell := item.cell(attack)) is not None]
    sides = _sides(evidence, attack)
    thresholds = sorted({cell.threshold for cell in cells})
    chart = None
    if any(cell.unit == "solve" for cell in cells):
        rows = [
            Strip(label, style, 100 * sum(side.accuracy) / len(side.accuracy), [100 * seed for seed in side.accuracy])
            for label, style, side, _ in sides
            if side.accuracy
        ]
        if rows:
            chart = charts.strips(f"Harmful accuracy under {words(attack)}", rows, "Harmful accuracy, %", zoom=False,
                                  threshold=100 * thresholds[0])
    else:
        curves = [Curves(label, style, item.runs(attack, role), side.steps_to_threshold)
                  for label, style, side, (item, role) in sides]
        drawn = [curve for curve in curves if curve.runs]
        metric = evidence[0].certificate.harmful_metric
        chart = charts.learning_curves(words(attack), drawn, thresholds, metric) if drawn else None
    return Figure(words(attack), family, chart, _caption(evidence, attack, cells))


def _sides(evidence: Sequence[Evidence], attack: str) -> list[tuple[str, Style, Side, tuple[Evidence, str]]]:
    """Base, scratch and every immunized model, in drawing order; base and scratch of the first exam that has them."""
    found: list[tuple[str, Style, Side, tuple[Evidence, str]]] = []
    for label, style, role in ((SCRATCH_LABEL, SCRATCH, "scratch"), (BASE_LABEL, BASE, "control")):
        for item in evidence:
            cell = item.cell(attack)
            side = None if cell is None else (cell.scratch if role == "scratch" else cell.control)
            if side is not None:
                found.append((label, style, side, (item, role)))
                break
    for index, item in enumerate(evidence):
        cell = item.cell(attack)
        if cell is not None and cell.subject is not None:
            found.append((item.label, style_of(index), cell.subject, (item, "subject")))
    return found


def _caption(evidence: Sequence[Evidence], attack: str, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for label, style, role in ((BASE_LABEL, BASE, "control"), (SCRATCH_LABEL, SCRATCH, "scratch")):
        found = next((cell for cell in cells if getattr(cell, role) is not None), None)
        if found is not None:
            said = _effort(found, getattr(found, role))
            lines.append({"label": label, "swatch": charts.swatch(style), "verdict": None, "text": said})
    for index, item in enumerate(evidence):
        cell = item.cell(attack)
        said = "not in this model's exam" if cell is None else _effort(cell, cell.subject) or sentence(cell.reason)
        lines.append({"label": item.label, "swatch": charts.swatch(style_of(index)), "text": said,
                      "verdict": "NOT RUN" if cell is None else cell.verdict})
    return lines


def _effort(cell: Cell, side: Side | None) -> str:
    if side is None:
        return ""
    if not side.accuracy:
        return f"all {text.plural(side.diverged, 'run')} diverged: failed tries, not resistance"
    if cell.unit == "solve":
        return f"{text.percent(text.accuracy(side))} in one solve"
    said = text.steps(side, cell.budget)
    return f"{said} steps" if side.steps_to_threshold else f"best accuracy {text.percent(text.accuracy(side))}"


def spectrum_figures(evidence: Sequence[Evidence]) -> list[Figure]:
    """One figure per site and task that any certificate holds a spectrum of."""
    return [
        Figure(f"{task} task", f"input of {site}",
               charts.spectra(f"Spectrum of the {task} features at {site}", _lines(evidence, site, task)), ())
        for site, task in _sites(evidence)
    ]


def _sites(evidence: Sequence[Evidence]) -> list[tuple[str, str]]:
    found: dict[tuple[str, str], None] = {}
    for item in evidence:
        for records in item.certificate.spectra.values():
            found |= {(record.site, record.task): None for record in records}
    return list(found)


def _lines(evidence: Sequence[Evidence], site: str, task: str) -> list[SpectrumLine]:
    lines = []
    before = next((record for item in evidence if (record := _spectrum(item, "base", site, task))), None)
    if before is not None:
        lines.append(SpectrumLine(BASE_LABEL, BASE, before))
    for index, item in enumerate(evidence):
        record = _spectrum(item, "immunized", site, task)
        if record is not None:
            lines.append(SpectrumLine(item.label, style_of(index), record))
    return lines


def _spectrum(item: Evidence, when: Literal["base", "immunized"], site: str, task: str) -> SpectrumRecord | None:
    records = item.certificate.spectra.get(when, [])
    return next((record for record in records if (record.site, record.task) == (site, task)), None)


def explanations(evidence: Sequence[Evidence]) -> list[dict[str, Any]]:
    """Per site and task, the intrinsic numbers of base and models; they explain and do not certify."""
    return [
        {
            "site": site,
            "task": task,
            "rows": [
                {
                    "label": line.label,
                    "condition": text.number(line.record.condition_number),
                    "rank": f"{line.record.rank} of {line.record.width}",
                    "effective": text.number(line.record.effective_rank),
                    "steps": "not reachable" if line.record.spectral_steps is None
                    else text.number(line.record.spectral_steps),
                    "rows": f"{line.record.rows:,}",
                    "status": line.record.status,
                }
                for line in _lines(evidence, site, task)
            ],
        }
        for site, task in _sites(evidence)
    ]


def cell_row(cell: Cell, metric: str = "accuracy") -> dict[str, Any]:
    """One row of the full table."""
    measured = cell.subject is not None and cell.control is not None
    return {
        "attack": words(cell.attack),
        "family": cell.family,
        "verdict": cell.verdict,
        "slow_down": text.slow_down(cell.slow_down) if measured and cell.unit == "step" else text.NONE,
        "steps": [text.steps(side, cell.budget) if cell.unit == "step" else text.NONE
                  for side in (cell.control, cell.subject)],
        "accuracy": [text.percent(text.accuracy(side)) for side in (cell.control, cell.subject)],
        "worst": [text.percent(max(side.accuracy)) if side and side.accuracy else text.NONE
                  for side in (cell.control, cell.subject)],
        "drop": text.points(cell.accuracy_drop) if measured else text.NONE,
        "deviation": text.points(cell.relative_fine_tuning_deviation, 1.0) if measured else text.NONE,
        "resistance": text.NONE if cell.normalized_resistance is None else text.points(cell.normalized_resistance, 1.0),
        "setting": _setting(cell),
        "further": further(cell, metric) if measured else "",
        "reason": sentence(cell.reason),
    }


def _setting(cell: Cell) -> str:
    """Threshold, budget, seeds, and what each side's attacker tried and chose."""
    said = [f"Threshold {text.percent(cell.threshold, 0)}; budget {text.plural(cell.budget, cell.unit)}"]
    if cell.seeds:
        said.append(f"seeds {', '.join(str(seed) for seed in cell.seeds)}")
    tried = [
        f"{label} {text.plural(side.trials, 'trial')}, {text.plural(side.diverged, 'diverged run')}, "
        + (f"chosen {side.trial}" if side.trial else "none chosen")
        for label, side in (("base", cell.control), ("immunized", cell.subject), ("from scratch", cell.scratch))
        if side is not None
    ]
    return "; ".join([*said, *tried]) + "."


def control_differs(evidence: Sequence[Evidence]) -> list[str]:
    """Attacks whose control came out differently in different models' exams: the page draws only the first."""
    differing = []
    for attacks in attacks_by_family(evidence).values():
        for attack in attacks:
            controls = [cell.control for item in evidence if (cell := item.cell(attack)) and cell.control]
            if any(control != controls[0] for control in controls[1:]):
                differing.append(words(attack))
    return differing
