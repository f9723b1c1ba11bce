"""How much 100 probes cost that are trained together, in units of one probe trained alone.

    python benchmarks/attack_throughput.py [--rows 5000] [--width 768] [--classes 10] [--steps 100]

100 probes = 5 learning rates × 4 update rules × 5 seeds, each seed with rows of its own. Prints seconds, the ratio,
and the largest difference of final weights to probes trained one by one.
"""

from __future__ import annotations

import argparse
import time

import torch

from hf_immunize.attacks._probes import ProbeData, adam, gradient_descent, initial_weights, momentum, train_probes


def synthetic(rows: int, width: int, classes: int, seeds: int) -> ProbeData:
    """Gaussian features with a mild class signal."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(seeds, rows, width + 1, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (seeds, rows), generator=generator)
    features[..., :classes] += torch.nn.functional.one_hot(labels, classes)
    features[..., -1] = 1
    return ProbeData(features, labels, features[:, :500], labels[0, :500], 250, classes)


def train(data: ProbeData, seeds: list[int], rates: list[float], rule, steps: int) -> tuple[float, torch.Tensor]:
    """Seconds and final weights."""
    weights = initial_weights(data, seeds, len(rates))
    start = time.perf_counter()
    for _ in train_probes(data, weights, rates, steps, rule()):
        pass
    return time.perf_counter() - start, weights


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("rows", 5000), ("width", 768), ("classes", 10), ("steps", 50)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    data = synthetic(options.rows, options.width, options.classes, 5)
    one = ProbeData(
        data.train_SND[:1], data.train_labels_SN[:1], data.judged_SMD[:1], data.judged_labels_M,
        data.validation_rows, data.classes,
    )
    rates = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    rules = {"gradient descent": gradient_descent, "momentum": momentum, "adam": adam,
             "adam, beta_1 = 0": lambda: adam(beta_1=0.0)}
    alone, _ = train(one, [0], rates[:1], gradient_descent, options.steps)
    together, largest = 0.0, 0.0
    for rule in rules.values():
        seconds, weights = train(data, list(range(5)), rates, rule, options.steps)
        together += seconds
        _, single = train(one, [0], rates[2:3], rule, options.steps)
        mine = weights[0].view(options.classes, len(rates), -1)[:, 2]
        largest = max(largest, float((mine - single[0]).abs().max()))
    count = len(rules) * len(rates) * 5
    print(f"one probe {alone:.2f} s; {count} probes {together:.2f} s: ratio {together / alone:.1f}")
    print(f"largest difference to one by one: {largest:.1e}")


if __name__ == "__main__":
    main()
