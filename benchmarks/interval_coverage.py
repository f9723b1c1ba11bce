"""How often 95 % intervals of a slow-down cover the truth: percentile bootstrap, studentized bootstrap, Student t.

    python benchmarks/interval_coverage.py

Synthetic exams: the log of steps on the model over steps on its base is drawn per seed from a normal, a skewed or a
two-valued distribution (half of the seeds easy, half hard), whose mean is known. Prints the table of docs/method.md.

A second table is about rho, the way from the base to an attacker without the model: log steps of base, model and random
weights vary by a quarter (standard deviation 0.25) around means whose rho is known, with one of the same three
distributions, seeds being independent between the sides. It is the table of docs/exam.md.
"""

from __future__ import annotations

import argparse

import numpy as np

from hf_immunize.exam.keeps import StepsToThreshold
from hf_immunize.metrics import normalized_resistance, student_t_quantile

LEVEL = 0.95
DRAWS = {
    "normal": lambda random, shape: random.normal(size=shape),
    "skewed (exponential)": lambda random, shape: random.exponential(size=shape) - 1,
    "two-valued": lambda random, shape: random.choice([-1.0, 1.0], size=shape) + 0.1 * random.normal(size=shape),
}


def percentile(values: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles of the resampled means."""
    means = values[:, index].mean(axis=2)
    return tuple(np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1))


def studentized(values: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles of the resampled t statistic; infinite where a resample of one repeated seed decides."""
    count = values.shape[1]
    again = values[:, index]
    centre, spread = values.mean(axis=1), values.std(axis=1, ddof=1) / np.sqrt(count)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (again.mean(axis=2) - centre[:, None]) / (again.std(axis=2, ddof=1) / np.sqrt(count))
    t = np.where(np.isnan(t), np.inf, t)
    low, high = np.quantile(t, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1, method="nearest")
    return centre - high * spread, centre - low * spread


def student(values: np.ndarray, _: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The interval of ``metrics.mean_interval``."""
    count = values.shape[1]
    half = student_t_quantile(LEVEL, count - 1) * values.std(axis=1, ddof=1) / np.sqrt(count)
    return values.mean(axis=1) - half, values.mean(axis=1) + half


SPREAD, BASE = 0.25, 1000
WAYS = ((0.75, 3.0), (0.75, 20.0), (0.25, 3.0), (0.25, 20.0))
"""rho, and how much slower random weights are than the base."""


def ways(exams: int) -> list[str]:
    """Coverage of rho's interval, and how often it has no bounds, by seeds, distribution, and truth."""
    random = np.random.default_rng(1)
    rows = ["| seeds | log steps | " + " | ".join(f"rho {rho:g}, scratch {far:g}x" for rho, far in WAYS) + " |",
            "|---|---|" + "---|" * len(WAYS)]
    for seeds in (3, 5, 10):
        for name, draw in DRAWS.items():
            row = [f"{seeds}", name]
            for rho, far in WAYS:
                means = {"subject": rho * np.log(far), "control": 0.0, "scratch": np.log(far)}
                hits = [_covered({side: mean + SPREAD * draw(random, (seeds,)) for side, mean in means.items()}, rho)
                        for _ in range(exams)]
                known = [hit for hit in hits if hit is not None]
                lost = 100 * (1 - len(known) / exams)
                row.append(f"{100 * np.mean(known):.1f} %" + (f" ({lost:.0f} % without)" if lost else ""))
            rows.append("| " + " | ".join(row) + " |")
    return rows


def _covered(logs: dict[str, np.ndarray], rho: float) -> bool | None:
    """Whether the interval of one exam covers; None where it has none."""
    sides = {side: {seed: StepsToThreshold(round(BASE * float(np.exp(value))), None, 10**9)
                    for seed, value in enumerate(values)} for side, values in logs.items()}
    found = normalized_resistance(sides["subject"], sides["control"], sides["scratch"], LEVEL)
    return None if found is None or found.low is None else found.low <= rho <= found.high


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exams", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=1000)
    given = parser.parse_args()
    random = np.random.default_rng(0)
    print("| seeds | log ratio | percentile bootstrap | studentized bootstrap | Student t |\n|---|---|---|---|---|")
    for seeds in (3, 5, 10):
        index = random.integers(seeds, size=(given.resamples, seeds))
        for name, draw in DRAWS.items():
            values = draw(random, (given.exams, seeds))
            row = [f"{seeds}", name]
            for interval in (percentile, studentized, student):
                low, high = interval(values, index)
                covered = 100 * np.mean((low <= 0) & (high >= 0))
                unbounded = 100 * np.mean(~np.isfinite(low) | ~np.isfinite(high))
                row.append(f"{covered:.1f} %" + (f" ({unbounded:.0f} % unbounded)" if unbounded else ""))
            print("| " + " | ".join(row) + " |")
    print("\n" + "\n".join(ways(given.exams)))


if __name__ == "__main__":
    main()
