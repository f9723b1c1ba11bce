"""Linear probes on the features of the last layer, trained step by step: one row each.

Rates of gradient descent are in units of 1/λ₁, λ₁ the largest eigenvalue of the features' second moment under the
row's map. Cross-entropy's Hessian is at most λ₁/2, so descent is certain below 4; above, it may oscillate and still be
faster, so the sweep goes far beyond. In these units the sweep means the same for features of any scale or offset: a
defender who multiplies or shifts features gains nothing by it. Rates of Adam are absolute, as in ``torch.optim.Adam``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from hf_immunize.attacks.core.shape import Attack, setting
from hf_immunize.attacks.vision._probes import Update, adam, gradient_descent, momentum, run_probes

_MAPS = "Feature map fitted on the training rows: raw, centered, standardized, whitened."


def _probe(
    told: str, covers: str, optimizer: Callable[[], Update], features: str, rates: tuple[float, ...], steps: int,
    *, rate: float, unit: str, family: str,
) -> Attack:  # fmt: skip
    """The attack of one row."""
    config = dataclasses.make_dataclass("Config", [
        ("learning_rate", float, setting(rate, f"Step size{unit}.", sweep=rates)),
        ("steps", int, setting(steps, "Budget in steps.")),
        ("features", str, setting(features, _MAPS)),
    ], frozen=True, namespace={"__module__": __name__})  # fmt: skip
    config.__doc__ = told
    return Attack(config, partial(run_probes, optimizer=optimizer), family, batched=True, covers=covers)


_OF_CENTRED = " in units of 1/λ₁ of the centred features; the stability limit is at 4"

LINEAR_PROBES: dict[str, Attack] = {
    "linear_probe_gd": _probe(
        "Full-batch gradient descent on cross-entropy, with a bias, on centred features divided by one scalar.",
        "nothing: the attacker that condition numbers are about",
        gradient_descent, "centered", (0.1, 1.0, 4.0, 16.0, 64.0, 256.0, 1024.0), 20000,
        rate=4.0, unit=_OF_CENTRED, family="linear probing",
    ),
    "linear_probe_momentum": _probe(
        "Full-batch Nesterov momentum on cross-entropy, with a bias, on centred features; rates as in linear_probe_gd.",
        "half of a condition number on a log scale",
        momentum, "centered", (0.1, 1.0, 4.0, 16.0, 64.0, 256.0), 5000,
        rate=4.0, unit=_OF_CENTRED, family="linear probing",
    ),
    "linear_probe_adam": _probe(
        "Full-batch Adam on cross-entropy, with a bias, on the features as they are.",
        "features whose columns have different scales, in part",
        adam, "raw", (1e-3, 1e-2, 1e-1, 1.0, 10.0), 2000, rate=1e-2, unit="", family="linear probing",
    ),
    "standardized_probe_adam": _probe(
        "Full-batch Adam on cross-entropy, with a bias, on features of mean 0 and standard deviation 1 per column.",
        "columns of any scale and offset",
        adam, "standardized", (1e-3, 1e-2, 1e-1, 1.0), 2000, rate=1e-2, unit="", family="whitened probing",
    ),
    "whitened_probe_gd": _probe(
        "Full-batch gradient descent on cross-entropy, with a bias, on features of identity second moment.",
        "any condition number",
        gradient_descent, "whitened", (0.01, 0.1, 1.0, 4.0, 16.0), 2000,
        rate=1.0, unit="; the stability limit is at 4", family="whitened probing",
    ),
}  # fmt: skip
"""By name. ``covers`` says what each undoes."""
