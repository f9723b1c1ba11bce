"""The cache of what the frozen part answers, for one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_immunize.data import collate_pixels, forward_rows
from hf_immunize.errors import ConfigError
from hf_immunize.training.vision.checks import dtype_of_images
from hf_immunize.training.vision.collators import InPrecision, collate_with_labels
from hf_immunize.training.vision.forwards import Forwards
from hf_immunize.training.vision.frozen import FeatureCache, check_repeatable
from hf_immunize.training.vision.harmful_task import HarmfulTask, WithoutTargets
from hf_immunize.training.vision.primary import check_primary_labels


def cache_of(
    forwards: Forwards, model: nn.Module, accelerator: Any, collator: Any, most_rows: int, rows: Mapping[str, Any]
) -> FeatureCache:
    """The cache of ``cache_frozen_features``; no row is computed yet.

    Args:
        rows: datasets by name, of which the first row is read to see that it stays the same.
        collator: the user's own, if there is one.
        most_rows: that go forward at once in training: as many fit where no graph is kept.

    Raises:
        ConfigError: a collator of the user's, or nothing that could be skipped.
        DataError: rows that cannot be cached.
    """
    args, boundary = forwards.args, forwards.frozen.boundary
    if collator is not None:
        raise ConfigError(
            "expected no data_collator of your own with cache_frozen_features, got one: it would be run once and "
            "for all. Preprocess in the dataset, or turn the cache off."
        )
    if boundary is None:
        raise ConfigError(
            "expected a frozen part that can be skipped for cache_frozen_features, got none: name what is trained "
            "with trainable_modules (e.g. 'last:1'), or turn the cache off."
        )
    for name, held in rows.items():
        check_repeatable(held, name)
    return FeatureCache(
        args.feature_cache_dir,
        model,
        boundary,
        WithoutTargets(InPrecision(collate_with_labels(collate_pixels, forwards.kind), dtype_of_images(model))),
        str(accelerator.mixed_precision),
        accelerator.autocast,
        min(forward_rows(boundary.image, args.device), most_rows),
    )


def with_cached_rows(cache: FeatureCache, trainer: Any, name: str, *, teacher: bool = False) -> Any:
    """A trainer's primary dataset with cached activations in the place of its images; None stays None.

    Args:
        teacher: whether θ₀'s logits are cached as well.
    """
    if (rows := getattr(trainer, name)) is None:
        return None
    return cache.dataset(rows, check_primary_labels(trainer.bare, rows, trainer.kind), name, teacher=teacher)


def with_cached_images(cache: FeatureCache, task: HarmfulTask, args: Any) -> HarmfulTask:
    """The same harmful task with cached activations in the place of its images.

    Raises:
        ConfigError: a simulated attacker that would have to see images.
    """
    labels = task.every_label  # counted by now: it may have one class only
    if "simulated_attack" in args.objectives and task.asks == "image":
        raise ConfigError(
            f"expected cache_frozen_features off for simulated_attack with {task.name}, whose rows have no labels to "
            "tell them apart: its attacker then learns from the images themselves. Turn the cache off, or label them."
        )
    return task.replaced(cache.dataset(task.rows, labels, task.name))
