"""From what both models did on each primary row to the utility of a certificate. Needs no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from hf_immunize.errors import RecordError
from hf_immunize.exam import Rule
from hf_immunize.metrics import mean_interval, paired_drop_interval
from hf_immunize.records import DatasetFingerprint, Utility, UtilityRows, sha256_file

UTILITY_FOLDER = "utility"
ACCURACY = "accuracy"
JUDGED = "accuracy of a judge on drawn images"
"""The measures in answers, by their names in a certificate: of rows of the data, and of what a model draws."""


def judge_utility(found: UtilityRows, level: float = 0.95) -> Utility:
    """Metric of both models in percent, with the interval of the drop over paired rows.

    Answers: accuracy, with the interval for matched proportions. Losses: R² = 1 − loss / energy, with the t interval of
    (loss of the immunized model − loss of the base) / mean energy, whose mean is the difference of both R².

    Raises:
        RecordError: losses whose energy is not positive.
    """
    if found.answers is not None:
        wanted = found.answers.wanted
        before, after = (
            [answer == right for answer, right in zip(side, wanted, strict=True)]
            for side in (found.answers.base, found.answers.immunized)
        )
        return Utility(
            metric=found.metric, base=100 * sum(before) / len(before), immunized=100 * sum(after) / len(after),
            drop=paired_drop_interval(before, after, level), rows=len(before),
        )
    assert found.losses is not None  # one of the two
    energy = fmean(found.losses.energy)
    if energy <= 0:
        raise RecordError(f"expected rows with a positive mean energy, got {energy}: measure utility again.")
    base, immunized = found.losses.base, found.losses.immunized
    drops = [100 * (late - early) / energy for early, late in zip(base, immunized, strict=True)]
    return Utility(
        metric=found.metric, base=100 * (1 - fmean(base) / energy), immunized=100 * (1 - fmean(immunized) / energy),
        drop=mean_interval(drops, level), rows=len(drops),
    )


def measures_differ(metrics: Sequence[str], rule: Rule, score: str) -> str | None:
    """How a certificate's utilities are not those of an exam, the one that decides first; None when they are.

    Args:
        metrics: in the certificate's order.
        score: what attackers are judged by: of a pipeline, utility is the same on the primary task.
    """
    wanted = [[JUDGED, score], [score]] if rule.gain else [[ACCURACY]]
    return None if list(metrics) in wanted else f"is not what this exam measures first, {wanted[0][0]!r}"


def rows_differ(found: UtilityRows, data: Sequence[DatasetFingerprint]) -> str | None:
    """How the rows behind a utility are not the primary data that they name; None when they are.

    A judge's answers on drawn images are as many as were drawn, and the images have no wanted class in the data.
    """
    named = next((part for part in data if part.sha256 == found.data), None)
    if named is None:
        return "it holds no split with their digest"
    if (found.answers is not None) != (found.metric in (ACCURACY, JUDGED)):
        return "answers are asked for, got losses, or the other way round"
    if found.metric == JUDGED:
        return None
    if found.rows != named.rows:
        return f"{named.rows} rows, answers on {found.rows}"
    if found.answers is not None and named.classes:
        counted = sorted(Counter(found.answers.wanted).values())
        if counted != sorted(count for count in named.classes.values() if count):
            return "other numbers of rows in its classes"
    return None


def keep_rows(folder: Path, measured: Sequence[UtilityRows]) -> dict[str, str]:
    """Write the rows of every measure beside the traces: SHA-256 by name relative to ``folder``."""
    kept = {}
    for found in measured:
        name = f"{UTILITY_FOLDER}/{found.file_name}"
        found.write(folder / name)
        kept[name] = sha256_file(folder / name)
    return kept
