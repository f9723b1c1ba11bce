"""How much 100 probes cost that are trained together, in units of one probe trained alone.

    OMP_NUM_THREADS=2 python benchmarks/attack_throughput.py [--rows 5000] [--width 768] [--classes 2 10] [--steps 20]

100 probes = 5 learning rates × 4 update rules × 5 seeds as one tensor program: the seeds share their rows
(``attack_fraction`` 1) and differ in where they start, or with ``--own_rows`` draw rows of their own. Its two products
are float32, everything else float64. One probe is the same problem by ``nn.Linear``, autograd and ``torch.optim.SGD``
in float64. Each repetition times one probe, then 100, so that both meet the same machine; prints the median seconds a
step, the median ratio and its range, the largest difference of final weights to probes trained one by one, and what the
arithmetic allows: 100 probes need 4·N·D·(C − 1)·100 operations a step, which at the measured speed of a large matrix
product is a floor that no batching passes.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from hf_immunize.attacks.vision._probes import (
    ProbeData,
    adam,
    gradient_descent,
    initial_weights,
    momentum,
    train_probes,
)

RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
RULES = {
    "gradient descent": gradient_descent,
    "momentum": momentum,
    "adam": adam,
    "adam, beta_2 = 0.95": lambda: adam(beta_2=0.95),
}
TORCH = {
    "gradient descent": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate),
    "momentum": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate, momentum=0.9, nesterov=True),
    "adam": lambda parameters, rate: torch.optim.Adam(parameters, lr=rate),
    "adam, beta_2 = 0.95": lambda parameters, rate: torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.95)),
}
SEEDS = list(range(5))


def synthetic(rows: int, width: int, classes: int, sets: int) -> ProbeData:
    """Gaussian features with a mild class signal, the last column being the bias; one set of rows or one a seed."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(sets, rows, width + 1, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (sets, rows), generator=generator)
    features[..., :classes] += nn.functional.one_hot(labels, classes)
    features[..., -1] = 1
    return ProbeData(features, labels, features[:, :50], labels[0, :50], 25, classes)


def together(data: ProbeData, steps: int) -> tuple[float, torch.Tensor]:
    """Seconds a step and final weights, S×C×T×D, of all 100 probes."""
    weights = initial_weights(data, SEEDS, len(RATES) * len(RULES)).to(data.train_GND)
    start = time.perf_counter()
    for _ in train_probes(data, weights, [(RATES, rule()) for rule in RULES.values()], steps):
        pass
    return (time.perf_counter() - start) / steps, weights.view(len(SEEDS), data.classes, -1, weights.shape[2])


def alone(data: ProbeData, seed: int, rate: float, rule: str, steps: int) -> tuple[float, torch.Tensor]:
    """Seconds a step and final weights, C×D, of one probe by torch's own means."""
    mine = min(seed, len(data.train_GND) - 1)
    features, labels = data.train_GND[mine], data.train_labels_GN[mine]
    probe = nn.Linear(features.shape[1], data.classes, bias=False, dtype=features.dtype)
    with torch.no_grad():
        probe.weight.copy_(initial_weights(data, SEEDS, 1)[seed])
    optimizer = TORCH[rule](probe.parameters(), rate)
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(probe(features), labels).backward()
        optimizer.step()
    return (time.perf_counter() - start) / steps, probe.weight.detach()


def largest_difference(data: ProbeData, weights: torch.Tensor, steps: int) -> float:
    """Of probes of every rule and seed, at two of the rates, to the same ones by torch's own means."""
    found = []
    for place, rule in enumerate(RULES):
        for seed, rate in [(seed, seed % len(RATES)) for seed in SEEDS]:
            _, single = alone(data, seed, RATES[rate], rule, steps)
            found.append(float((weights[seed, :, place * len(RATES) + rate] - single).abs().max()))
    return max(found)


def floor(data: ProbeData) -> float:
    """Seconds a step that the two products of 100 probes take by themselves."""
    sets, rows, width = data.train_GND.shape
    columns = (data.classes - 1) * 100 // sets
    left, right = (torch.randn(sets, columns, size, dtype=torch.float32) for size in (width, rows))
    rows_GND, columns_GDN = data.train_GND.float(), data.train_GND.float().mT.contiguous()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        torch.bmm(left, rows_GND.mT), torch.bmm(right, columns_GDN.mT)
        times.append(time.perf_counter() - start)
    return min(times)


def compare(data: ProbeData, steps: int, repeats: int) -> str:
    """One line of the printed table."""
    pairs = []
    for _ in range(repeats):
        one, _ = alone(data, 0, RATES[0], "gradient descent", steps)
        seconds, weights = together(data, steps)
        pairs.append((one, seconds))
    ratios = sorted(seconds / one for one, seconds in pairs)
    one, seconds = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    return (
        f"{data.classes} classes: one probe {one:.1f} ms a step, 100 probes {seconds:.1f} ms, "
        f"ratio {statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}; the products alone: "
        f"{1e3 * floor(data) / one:.1f}), largest difference to one by one "
        f"{largest_difference(data, weights, steps):.1e}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("rows", 5000), ("width", 768), ("steps", 20), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--own_rows", action="store_true", help="Every seed draws rows of its own.")
    options = parser.parse_args()
    sets = len(SEEDS) if options.own_rows else 1
    print(f"N = {options.rows}, D = {options.width}, {torch.get_num_threads()} threads, {options.steps} steps")
    for classes in options.classes:
        data = synthetic(options.rows, options.width, classes, sets)
        print(compare(data, options.steps, options.repeats), flush=True)


if __name__ == "__main__":
    main()
