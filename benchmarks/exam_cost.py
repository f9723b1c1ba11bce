"""How long a preset exam of a model takes on this machine: single steps are timed, the plan is multiplied out.

    OMP_NUM_THREADS=2 python benchmarks/exam_cost.py --model_path MODEL --size 128 --classes 30 --rows 398 94 247 \
        --protocol standard

MODEL is a folder or Hub id of an image classifier; --rows are those of the attacker's training, validation and test
splits, of random pixels here, which cost what real ones do. For each attack of the protocol: runs of one model, steps,
and hours; then the whole exam of one model and its base. Fine-tuning is timed per batch size, an evaluation and a probe
step once; ridge probes and feature extraction are timed as they are. ``--cores`` divides by what more cores give where
the timing itself ran on one.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from hf_immunize.attacks import ATTACKS, count_runs, evaluation_steps, load_classifier, parse_settings, plan_runs
from hf_immunize.attacks.vision._finetune import FinetuneConfig
from hf_immunize.attacks.vision._probes import ProbeData, adam, gradient_descent, initial_weights, train_probes
from hf_immunize.certification import find_protocol
from hf_immunize.data import forward_rows
from hf_immunize.features import find_classifier, prefer_channels_last

TRIES = 3


def median(action) -> float:
    """Seconds of CPU time per core in use, the median of a few tries after one to warm up: other jobs do not count."""
    action()
    times = []
    for _ in range(TRIES):
        start = time.process_time()
        action()
        times.append((time.process_time() - start) / torch.get_num_threads())
    return statistics.median(times)


def step_seconds(model, size: int, classes: int, batch: int) -> float:
    """One optimizer step on every weight."""
    pixels, labels = torch.randn(batch, 3, size, size), torch.randint(classes, (batch,))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    return median(step)


def forward_seconds(model, size: int) -> float:
    """One row's forward, in the batches that evaluations use."""
    rows = forward_rows((3, size, size))
    pixels = torch.randn(rows, 3, size, size)

    @torch.no_grad()
    def forward() -> None:
        model(pixel_values=pixels)

    model.eval()
    return median(forward) / rows


def probe_seconds(rows: int, width: int, classes: int, trials: int, seeds: int, compressed: bool) -> float:
    """One step of all probes of one attack; in the row space where that is smaller and the rule allows it."""
    width = min(rows, width) if compressed else width + 1
    features, labels = torch.randn(seeds, rows, width).double(), torch.randint(classes, (seeds, rows))
    data = ProbeData(features, labels, features[:, :9], labels[0, :9], 4, classes)
    weights, rule = initial_weights(data, list(range(seeds)), trials), gradient_descent if compressed else adam

    def steps() -> None:
        for _ in train_probes(data, weights, [([1e-3] * trials, rule())], 5):
            pass

    return median(steps) / 5


def main() -> None:
    """Time, multiply, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--protocol", default="standard")
    parser.add_argument("--rows", type=int, nargs=3, default=[398, 94, 247])
    for name, value in (("size", 128), ("classes", 30)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--cores", type=float, default=1.0, help="Divide by this speed-up over the timed threads.")
    options = parser.parse_args()
    protocol = find_protocol(options.protocol)
    settings = parse_settings(list(protocol.settings), ATTACKS)
    model = load_classifier(options.model_path)
    width = model.get_submodule(find_classifier(model)).in_features
    prefer_channels_last(model)
    forward = forward_seconds(model, options.size)
    steps = {batch: step_seconds(model, options.size, model.config.num_labels, batch) for batch in (8, 16, 32)}
    print(f"{torch.get_num_threads()} threads: step of " + ", ".join(f"{b} rows {s:.2f} s" for b, s in steps.items())
          + f", evaluation of {sum(options.rows[1:])} rows {forward * sum(options.rows[1:]):.2f} s")
    train_rows, seeds, whole = round(0.8 * options.rows[0]), len(protocol.seeds), 0.0
    for name in protocol.attacks:
        attack = ATTACKS[name]
        runs = plan_runs(attack, protocol.seeds, settings.get(name), protocol.trials)
        count = count_runs(attack, runs, protocol.seeds, protocol.tuning_seeds)
        trials, config = len({run.trial for run in runs}), runs[0].config
        if isinstance(config, FinetuneConfig):
            step = statistics.fmean(steps[min(steps, key=lambda b: abs(b - run.config.batch_size))] for run in runs)
            points = len(evaluation_steps(config.steps, config.evaluation_ratio))
            seconds = count * (config.steps * step + points * forward * sum(options.rows[1:]))
        elif attack.unit == "step" and hasattr(config, "learning_rate"):
            linear = name in ("linear_probe_gd", "linear_probe_momentum", "whitened_probe_gd", "fold_linear_map")
            step = probe_seconds(train_rows, width, options.classes, trials, seeds, linear)
            seconds = config.steps * step + forward * sum(options.rows)
        else:
            seconds = forward * sum(options.rows) * (seeds if name == "batchnorm_probe" else 5)
        whole += seconds / options.cores
        print(f"{name:24} {count:4} runs of one model, {seconds / options.cores / 60:7.1f} min")
    print(f"{protocol.name}: {whole / 3600:.2f} h for one model, {2 * whole / 3600:.2f} h with its base")


if __name__ == "__main__":
    main()
