"""How often 95 % intervals of a slow-down cover the truth: percentile bootstrap, studentized bootstrap, Student t.

    python benchmarks/interval_coverage.py

Synthetic exams: the log of steps on the model over steps on its base is drawn per seed from a normal, a skewed or a
two-valued distribution (half of the seeds easy, half hard), whose mean is known. Prints the table of docs/method.md.
"""

from __future__ import annotations

import argparse

import numpy as np

from hf_immunize.metrics import student_t_quantile

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


if __name__ == "__main__":
    main()
