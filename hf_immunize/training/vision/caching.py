"""The cache of what the frozen part answers, for one run."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_immunize.data import collate_pixels, forward_rows
from hf_immunize.errors import ConfigError
from hf_immunize.training.vision.collators import collate_with_labels
from hf_immunize.training.vision.forwards import Forwards
from hf_immunize.training.vision.frozen import FeatureCache
from hf_immunize.training.vision.harmful_task import WithoutTargets


def cache_of(
    forwards: Forwards, model: nn.Module, accelerator: Any, collator: Any, most_rows: int
) -> FeatureCache:
    """The cache of ``cache_frozen_features``.

    Args:
        collator: the user's own, if there is one.
        most_rows: that go forward at once in training: as many fit where no graph is kept.

    Raises:
        ConfigError: a collator of the user's, or nothing that could be skipped.
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
    return FeatureCache(
        args.feature_cache_dir,
        model,
        boundary,
        WithoutTargets(collate_with_labels(collate_pixels, forwards.kind)),
        str(accelerator.mixed_precision),
        accelerator.autocast,
        min(forward_rows(boundary.image, args.device), most_rows),
    )
