"""What κ slows and what it does not: probing curves of Fig. 1, and attackers who whiten, on immunized House Prices.

    python benchmarks/linear_attackers.py --data_dir <folder with D1.csv, D2.csv and mnist.npz>

``--house_dir`` and ``--mnist_dir`` name two folders instead. Writes docs/results/linear/attackers.json,
convergence.png and attackers.png, prints the table of docs/condition-number-limits.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hf_immunize.linear import LinearImmunizer, line_search_probe, load_house_prices, load_mnist, slant_labels
from hf_immunize.records import Provenance, atomic_write

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

OUT = Path(__file__).resolve().parents[1] / "docs" / "results" / "linear"
STEPS, SEEDS, LEVEL = 2000, 5, 0.05
RATES = np.geomspace(1e-4, 10, 21)
PENALTIES = np.geomspace(1e-6, 1e3, 28)
COLORS = {"raw": "tab:grey", "algorithm1": "tab:blue", "closed_form": "tab:red"}


def extractors(immunizer: LinearImmunizer, **options) -> dict[str, Tensor]:
    """θ of the control and of two immunizations."""
    width = immunizer.primary.factor.width
    return {
        "raw": torch.eye(width, dtype=torch.float64),
        "algorithm1": immunizer.algorithm1(seed=0, **options).theta_DD,
        "closed_form": immunizer.closed_form().theta_DD,
    }


def convergence(tasks: dict[str, tuple[Tensor, Tensor]], thetas: dict[str, Tensor]) -> dict[str, dict[str, list]]:
    """Fig. 1: norm ratio and excess loss, means over seeds at 60 log-spaced steps, per task and extractor."""
    at = np.unique(np.geomspace(1, STEPS, 60).astype(int))
    curves: dict[str, dict[str, list]] = {"steps": {"at": at.tolist()}}
    for task, (rows, labels) in tasks.items():
        curves[task] = {}
        for name, theta in thetas.items():
            found = line_search_probe(rows @ theta, labels, steps=STEPS, seeds=SEEDS)
            curves[task][name] = {
                "norm_ratio": found.norm_ratio_ST.mean(dim=0)[at].tolist(),
                "excess_loss": found.excess_loss_ST.mean(dim=0)[at].tolist(),
            }
    return curves


def adam_excess(features: Tensor, labels: Tensor, floor: float) -> tuple[float, np.ndarray]:
    """(best rate, its excess loss by step): full-batch Adam from w = 0, every rate of the sweep at once."""
    gram, cross = features.T @ features / len(labels), features.T @ labels / len(labels)
    energy, rates = float(labels.square().mean()), torch.from_numpy(RATES)[:, None]
    weights = torch.zeros(len(RATES), features.shape[1], dtype=torch.float64)
    first, second, losses = torch.zeros_like(weights), torch.zeros_like(weights), []
    for step in range(STEPS + 1):
        loss = ((weights @ gram) * weights).sum(1) - 2 * weights @ cross + energy
        losses.append((loss - floor) / (energy - floor))
        gradient = 2 * (weights @ gram - cross)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        scale = (1 - 0.999 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1))
        weights = weights - rates * scale * first / (second.sqrt() + 1e-12)
    table = torch.stack(losses, dim=1).numpy()
    reached = np.where((table <= LEVEL).any(1), (table <= LEVEL).argmax(1), STEPS + 1)
    best = int(np.lexsort((table[:, -1], reached))[0])
    return float(RATES[best]), table[best]


def held_out_r2(rows: Tensor, labels: Tensor, judged: tuple[Tensor, Tensor], whiten: bool) -> float:
    """Held-out R² of ridge regression, penalty chosen on the first half of the held-out rows, judged on the second."""
    test_rows, test_labels = judged
    if whiten:
        _, sigma, right_t = torch.linalg.svd(rows, full_matrices=False)
        rank = int((sigma > max(rows.shape) * torch.finfo(rows.dtype).eps * sigma[0]).sum())
        basis = right_t[:rank].T / sigma[:rank]
        rows, test_rows = rows @ basis, test_rows @ basis
    eye, size = torch.eye(rows.shape[1], dtype=rows.dtype), float(rows.square().sum())
    half = len(test_labels) // 2
    scores = []
    for penalty in PENALTIES:
        head = torch.linalg.solve(rows.T @ rows + penalty * size / rows.shape[1] * eye, rows.T @ labels)
        error = (test_rows @ head - test_labels).square()
        parts = [slice(0, half), slice(half, None)]
        scores.append([1 - float(error[p].mean() / test_labels[p].var()) for p in parts])
    return max(scores)[1]


def held_out_scores(given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Held-out R² with rows to spare (three quarters of all harmful rows), so that the range is the whole table's."""
    primary, harmful = load_house_prices(given.house_dir or given.data_dir, rows=None)
    order = np.random.default_rng(0).permutation(len(harmful.labels))
    train, test = np.split(order, [3 * len(order) // 4])
    rows, labels = torch.from_numpy(harmful.features), torch.from_numpy(harmful.labels)
    immunizer = LinearImmunizer(primary.features, rows[train], primary_labels=primary.labels)
    found = {}
    for name, theta in extractors(immunizer).items():
        features, judged = rows[train] @ theta, (rows[test] @ theta, labels[test])
        found[name] = {
            "ridge": held_out_r2(features, labels[train], judged, whiten=False),
            "whitened ridge": held_out_r2(features, labels[train], judged, whiten=True),
            "rir": immunizer.report(theta).rank_aware.ratio,
            "common_rir": immunizer.report(theta).common_ratio,
        }
    return found


def attack(rows: Tensor, labels: Tensor, theta: Tensor) -> dict:
    """Every attacker on one extractor: excess training loss by step and steps to LEVEL."""
    features = rows @ theta
    residual = labels - rows @ torch.linalg.lstsq(rows, labels[:, None], driver="gelsd").solution[:, 0]
    raw = line_search_probe(features, labels, steps=STEPS, seeds=1, initial_scale=0.0)
    white = line_search_probe(features, labels, steps=20, seeds=1, initial_scale=0.0, whitened=True)
    rate, adam = adam_excess(features, labels, float(residual.square().mean()))
    spread = features.std(dim=0)
    scale = torch.where(spread > 1e-12 * spread.max(), spread, torch.ones_like(spread))
    std_rate, std_adam = adam_excess(features / scale, labels, float(residual.square().mean()))
    curves = {
        "gradient descent": raw.excess_loss_ST[0].numpy(),
        "Adam, best of 21 rates": adam,
        "Adam, standardized": std_adam,
        "whitened gradient descent": white.excess_loss_ST[0].numpy(),
    }
    first: Callable = lambda curve: int((curve <= LEVEL).argmax()) if (curve <= LEVEL).any() else None  # noqa: E731
    return {
        "steps_to_level": {name: first(curve) for name, curve in curves.items()},
        "final_excess": {name: float(curve[-1]) for name, curve in curves.items()},
        "rates": {"Adam": rate, "Adam, standardized": std_rate},
        "curves": {name: curve[np.unique(np.geomspace(1, len(curve), 80).astype(int)) - 1].tolist()
                   for name, curve in curves.items()},
        "curve_steps": {name: (np.unique(np.geomspace(1, len(curve), 80).astype(int)) - 1).tolist()
                        for name, curve in curves.items()},
    }  # fmt: skip


def draw_convergence(found: dict[str, dict], path: Path) -> None:
    """Fig. 1: two tasks by two data sets; the distance to w* above, what it costs below."""
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.6), sharex=True)
    panels = [(data, task) for data in found for task in ("primary", "harmful")]
    for column, (data, task) in enumerate(panels):
        for row, kind in enumerate(("norm_ratio", "excess_loss")):
            for name, curve in found[data][task].items():
                values = np.maximum(curve[kind], 1e-16)
                style = "--" if name == "closed_form" else "-"
                axes[row, column].plot(found[data]["steps"]["at"], values, style, color=COLORS[name], label=name)
            axes[row, column].set(xscale="log", yscale="log")
            low, high = axes[row, column].get_ylim()
            axes[row, column].set_ylim(min(low, high / 100), 2 * high)
        axes[0, column].set_title(f"{data}: {task} task", fontsize=10)
        axes[1, column].set_xlabel("step")
    axes[0, 0].set_ylabel("‖w$_t$ − w*‖² / ‖w$_0$ − w*‖²")
    axes[1, 0].set_ylabel("excess loss / loss of w = 0")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle("Gradient descent with exact line search, mean of 5 random heads: lower = faster")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_attackers(found: dict[str, dict], path: Path) -> None:
    """Excess harmful loss by step, one panel per attacker."""
    names = list(found["raw"]["curves"])
    figure, axes = plt.subplots(1, len(names), figsize=(17, 3.9), sharey=True)
    for axis, name in zip(axes, names, strict=True):
        for extractor, style in (("raw", "-"), ("algorithm1", "-"), ("closed_form", "--")):
            entry = found[extractor]
            axis.plot(np.array(entry["curve_steps"][name]) + 1, np.maximum(entry["curves"][name], 1e-14), style,
                      color=COLORS[extractor], label=extractor)  # fmt: skip
        axis.axhline(LEVEL, color="k", lw=0.6, ls=":")
        axis.set(xscale="log", yscale="log", xlabel="step + 1", title=name)
    axes[0].set_ylabel("excess harmful training loss (1 = no head)")
    axes[0].legend(loc="lower left")
    figure.suptitle(f"House Prices, harmful task: κ slows who follows the gradient (dotted: {LEVEL:g})")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def print_tables(found: dict[str, dict], held_out: dict[str, dict[str, float]]) -> None:
    """Markdown tables of steps and of held-out scores."""
    names = list(found["raw"]["curves"])
    print(f"| extractor | {' | '.join(names)} |")
    print("|" + "---|" * (len(names) + 1))
    for extractor, entry in found.items():
        steps = [
            str(entry["steps_to_level"][n]) if entry["steps_to_level"][n] is not None
            else f">{STEPS} (at {entry['final_excess'][n]:.2g})" for n in names
        ]  # fmt: skip
        print(f"| {extractor} | {' | '.join(steps)} |")
    print("\n| extractor | RIR | common-range RIR | ridge, held-out R² | whitened ridge, held-out R² |")
    print("|" + "---|" * 5)
    for name, entry in held_out.items():
        print(f"| {name} | {entry['rir']:.4g} | {entry['common_rir']:.4g} | {entry['ridge']:.4f} | "
              f"{entry['whitened ridge']:.4f} |")  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir")
    parser.add_argument("--house_dir")
    parser.add_argument("--mnist_dir")
    given = parser.parse_args()
    torch.set_num_threads(1)
    progress = tqdm(total=5, desc="attackers")
    primary, harmful = load_house_prices(given.house_dir or given.data_dir)
    tasks = {
        name: (torch.from_numpy(task.features), torch.from_numpy(task.labels))
        for name, task in (("primary", primary), ("harmful", harmful))
    }
    immunizer = LinearImmunizer(tasks["primary"][0], tasks["harmful"][0], primary_labels=tasks["primary"][1])
    thetas = extractors(immunizer)
    curves = {"House Prices": convergence(tasks, thetas)}
    attacks = {}
    for name, theta in thetas.items():
        attacks[name] = attack(*tasks["harmful"], theta)
        progress.update()
    held_out = held_out_scores(given)
    pixels, digits = load_mnist(given.mnist_dir or given.data_dir)
    rows = {name: pixels[digits == digit] for name, digit in (("primary", 0), ("harmful", 1))}
    digit_tasks = {name: (torch.from_numpy(x), torch.from_numpy(slant_labels(x))) for name, x in rows.items()}
    pair = LinearImmunizer(rows["primary"], rows["harmful"], primary_labels=digit_tasks["primary"][1])
    progress.update()
    curves["MNIST 0 → 1"] = convergence(digit_tasks, extractors(pair, epochs=30, steps_per_epoch=1, balance=1.0))
    progress.update()
    written = {"convergence": curves, "attackers": attacks, "held_out": held_out, "level": LEVEL, "steps": STEPS,
               "provenance": Provenance.here().model_dump()}  # fmt: skip
    atomic_write(OUT / "attackers.json", json.dumps(written) + "\n")
    draw_convergence(curves, OUT / "convergence.png")
    draw_attackers(attacks, OUT / "attackers.png")
    print_tables(attacks, held_out)


if __name__ == "__main__":
    main()
