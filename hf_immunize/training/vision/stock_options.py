"""Options of the stock Trainer that a run with harmful rows cannot take as they are, each with what to do instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from hf_immunize.errors import ConfigError
from hf_immunize.training.vision.primary import SINGLE

_SORTED = ("group_by_length", "batch_rebalance")


def check_stock_options(args: Any, kind: str, metrics: Callable[..., Any] | None) -> None:
    """Raise ConfigError for an option that would be ignored, or would not do what its name says.

    docs/training.md has the table of what each option does here.

    Args:
        kind: of the primary task.
        metrics: ``compute_metrics``, or the one of the kind.
    """
    if args.train_sampling_strategy in _SORTED:
        raise ConfigError(
            f"expected train_sampling_strategy 'random' or 'sequential', got {args.train_sampling_strategy!r}: images "
            "have no length to sort by."
        )
    if args.label_smoothing_factor and kind != SINGLE:
        raise ConfigError(
            f"expected label_smoothing_factor=0 for a {kind} head, got {args.label_smoothing_factor}: it spreads a "
            "single label over classes. Change the labels in the dataset."
        )
    if args.batch_eval_metrics and metrics and "compute_result" not in inspect.signature(metrics).parameters:
        raise ConfigError(
            "expected a compute_metrics(prediction, compute_result) for batch_eval_metrics, got one without "
            "compute_result: add it, or leave compute_metrics out."
        )
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    if args.push_to_hub and strategy in ("checkpoint", "all_checkpoints"):
        raise ConfigError(
            f"expected hub_strategy 'end' or 'every_save', got {strategy!r}: checkpoints are never pushed, since no "
            "certificate can speak of it. What is pushed is the finished model, once it has one."
        )
