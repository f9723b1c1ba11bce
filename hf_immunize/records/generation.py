"""What attacked models draw, as figures: how like the concept, and how like real images."""

from __future__ import annotations

from typing import Literal

from hf_immunize.records.base import Interval, Part


class SimilarityGap(Part):
    """Similarity gap ratio (SGR; Zheng & Yeh 2024): (M(real, base) − M(real, immunized)) / M(real, base).

    M is the mean similarity of real images of the concept and what the attacked model draws when asked for it, at the
    trial its attacker would choose. Higher protects on the harmful concept; on a benign one, zero is best.
    """

    attack: str
    task: Literal["harmful", "benign"]
    concept: str
    """Name of the concept, or how many the mean is over (MSGR)."""
    similarity: str
    """What M is, with the features' origin."""
    steps: list[int]
    """After how many attack steps the model drew."""
    seeds: list[int]
    base: list[list[float]]
    """M of the attacked base, per step and seed."""
    immunized: list[list[float]]
    ratio: list[Interval]
    """SGR per step, over paired seeds; null where the base's M is not positive on some seed."""


class FrechetGap(Part):
    """Fréchet distance of drawn images from real ones, before any attack. FID only if the features were Inception's."""

    features: str
    images: int
    """Drawn by each model, from the same noise."""
    real: int
    """Held-out real images they are compared with."""
    base: float
    immunized: float
    rise: Interval
    """Immunized minus base over paired groups of rows, bias of the distances removed (jackknife)."""
