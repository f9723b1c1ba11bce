"""How like the concept, and how like real images, models draw: what page and card print of it."""

from __future__ import annotations

from hf_immunize.records import Certificate, Interval
from hf_immunize.report import text


def gap_rows(certificate: Certificate) -> list[dict[str, str]]:
    """One row per attack and concept: SGR as the attack went on, and both similarities at its end."""
    return [
        {
            "attack": gap.attack.removeprefix("benign_").removeprefix("diffusion_"),
            "concept": f"{gap.task} ({gap.concept})",
            "moments": ", ".join(
                f"{_share(found.estimate)} after {step}" for step, found in zip(gap.steps, gap.ratio, strict=True)
            ),
            "interval": _bounds(gap.ratio[-1]),
            "pair": f"{text.number(text.mean(gap.base[-1]))} → {text.number(text.mean(gap.immunized[-1]))}",
            "measure": gap.similarity,
        }
        for gap in certificate.similarity
    ]


def frechet_words(certificate: Certificate) -> str | None:
    """The distance of retained drawings from real images, as one line; None where it was not measured."""
    found = certificate.frechet
    if found is None:
        return None
    rise = found.rise
    bounds = "no interval" if rise.low is None else f"{text.number(rise.low)} to {text.number(rise.high)}"
    return (
        f"Fréchet distance of {found.images:,} drawn from {found.real:,} real retained images, by features of "
        f"{found.features}: {text.number(found.base)} → {text.number(found.immunized)}, rise "
        f"{text.number(rise.estimate)} ({bounds})"
    )


def _share(value: float | None) -> str:
    return text.NONE if value is None else f"{100 * value:.1f}%".replace("-", "−")


def _bounds(found: Interval) -> str:
    return text.NONE if found.low is None else f"{_share(found.low)} to {_share(found.high)}"
