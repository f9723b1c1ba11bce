"""The metric that the guard compares: a share of 0..1, higher is better, that an evaluation gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from transformers.utils import logging

from hf_immunize.data import id2label_of, output_names
from hf_immunize.errors import ConfigError
from hf_immunize.training.core.guard import UtilityGuard
from hf_immunize.training.vision.metrics import BaseLabels

logger = logging.get_logger(__name__)


def refuse_lower_is_better(metric: str) -> None:
    """Raise ConfigError for a loss or an error by its name: a guard holds a drop, and these get better by one."""
    if metric.lower().endswith(("loss", "error", "mse", "mae")):
        raise ConfigError(
            f"expected a guard_metric of which more is better, got {metric!r}: it is better when it drops, which the "
            "guard would forbid. Name a share of 0..1, such as accuracy, that compute_metrics gives."
        )


def points_of(metrics: Mapping[str, float], metric: str, prefix: str = "eval") -> float:
    """The metric of one evaluation in points, hundredths of its share.

    Raises:
        ConfigError: an evaluation without it.
    """
    key = f"{prefix}_{metric}"
    if key not in metrics:
        raise ConfigError(f"expected metric {metric!r} in {sorted(metrics)}: set guard_metric.")
    return 100.0 * metrics[key]


def base_points(metrics: Mapping[str, float], metric: str, *, guards: bool, prefix: str = "base") -> float | None:
    """The metric of the model before immunization, in points; None where it cannot be compared and need not be.

    Args:
        guards: whether ``max_primary_drop`` rests on it; without, it is only watched.

    Raises:
        ConfigError: it is missing, not finite, or no share of 0..1, and is to guard.
    """
    try:
        points = points_of(metrics, metric, prefix)
        _refuse_incomparable(points / 100, metric)
    except ConfigError as error:
        if guards:
            raise
        logger.warning(f"The primary metric is not watched, {error}")
        return None
    return points


def measured_base(
    evaluate: Callable[..., dict[str, float]], labels: BaseLabels | None, config: Any, guard: UtilityGuard,
) -> float | None:
    """The guarded metric of the model before immunization, in points, by an evaluation of it; see ``base_points``.

    Args:
        labels: sees its answers; raises DataError where the model calls the classes otherwise than the rows do.
        config: of the model, which names its outputs.
    """
    if labels is not None:
        labels.open = True
    points = base_points(evaluate("base"), guard.metric, guards=guard.allowed is not None)
    if labels is not None:
        labels.refuse_other_order(output_names(id2label_of(config)), "eval_dataset")
    return points


def _refuse_incomparable(base: float, metric: str) -> None:
    if not math.isfinite(base):
        raise ConfigError(
            f"expected a finite {metric!r} of the model before immunization, got {base}: no drop from it can be told. "
            "Mend compute_metrics, or name another guard_metric."
        )
    if base > 1:
        raise ConfigError(
            f"expected a share of 0..1 as {metric!r} of the model before immunization, got {base:g}: max_primary_drop "
            "is in points, hundredths of such a share. Divide a percentage by 100 in compute_metrics, or name another "
            "guard_metric."
        )
