"""What a step of diffusion immunization costs, in units of a plain diffusers training step on the same images.

    OMP_NUM_THREADS=1 python benchmarks/diffusion_step.py [--rows 32] [--size 14] [--rounds 9]

The plain step is the loop of diffusers' examples (noise by the scheduler, loss, clipping, AdamW) on one batch that
holds the retain and the harmful rows of our step. Both see one UNet2DModel of the MNIST recipe, in float32. Steps of
all kinds alternate; the ratio is that of the medians over rounds of processor time, which other programs on the machine
disturb less than they disturb the clock; wall time is printed beside it. The simulated attack is run on all weights, on
LoRA factors, and with its exact gradient. Peak memory is the highest resident size of a process of its own per case.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import diffusers
import torch
from diffusers.optimization import get_scheduler
from memory import highest_resident

from hf_immunize.diffusion import LatentDataset
from hf_immunize.training.diffusion import DiffusionImmunizationConfig, DiffusionImmunizationTrainer

CASES = {
    "plain": {},
    "condition_number": {"objective": "condition_number"},
    "simulated_attack, K=4": {"objective": "simulated_attack", "attacker_steps": 4},
    "simulated_attack, K=4, LoRA": {"objective": "simulated_attack", "attacker_steps": 4, "attacker_rank": 8},
    "simulated_attack, K=4, second order": {
        "objective": "simulated_attack", "attacker_steps": 4, "attacker_second_order": True,
    },
    "imma": {"objective": "imma", "trainable": "attention", "attacker_rank": 8},
}


def unet(size: int) -> diffusers.UNet2DModel:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=size, in_channels=1, out_channels=1, block_out_channels=(32, 64), layers_per_block=1,
        norm_num_groups=8, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=10,
    )


def images(rows: int, size: int, label: int) -> LatentDataset:
    labels = torch.full((rows,), label)
    pixels = torch.randn(rows, 1, size, size, generator=torch.Generator().manual_seed(label))
    return LatentDataset(pixels, {"class_labels": labels}, labels, [str(digit) for digit in range(10)])


def plain_step(rows: int, size: int) -> Callable[[], None]:
    """One step on 2·rows images."""
    model, scheduler = unet(size).train(), diffusers.DDPMScheduler()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    schedule = get_scheduler("constant", optimizer)
    parts = [images(4 * rows, size, label) for label in (0, 9)]

    def step() -> None:
        drawn = [part.batch(torch.randint(len(part), (rows,))) for part in parts]
        clean, labels = (torch.cat([getattr(batch, name) for batch in drawn]) for name in ("latents", "labels"))
        noise, told = torch.randn_like(clean), torch.randint(1000, (len(clean),))
        answer = model(scheduler.add_noise(clean, noise, told), told, class_labels=labels, return_dict=False)[0]
        torch.nn.functional.mse_loss(answer, noise).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_step(rows: int, size: int, options: dict) -> Callable[[], None]:
    trainer = DiffusionImmunizationTrainer(
        unet(size), diffusers.DDPMScheduler(),
        DiffusionImmunizationConfig(
            tempfile.mkdtemp(), per_device_train_batch_size=rows, per_device_harmful_batch_size=rows, use_cpu=True,
            disable_progress=True, logging_steps=1000, **options,
        ),
        train_dataset=images(4 * rows, size, 0), harmful_dataset=images(4 * rows, size, 9),
    )
    trainer._measure_base()
    return trainer._take_step


def build(case: str, rows: int, size: int) -> Callable[[], None]:
    return plain_step(rows, size) if case == "plain" else our_step(rows, size, CASES[case])


def peak(case: str, arguments: argparse.Namespace) -> float:
    """MiB of a process that makes three steps of one case."""
    words = [sys.executable, __file__, "--rows", str(arguments.rows), "--size", str(arguments.size), "--peak", case]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--size", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", action="store_true", help="Measure peak memory too.")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        step = build(arguments.peak, arguments.rows, arguments.size)
        for _ in range(3):
            step()
        print(highest_resident())
        return
    steps = {case: build(case, arguments.rows, arguments.size) for case in CASES}
    spent: dict[str, list[tuple[float, float]]] = {case: [] for case in steps}
    for turn in range(arguments.rounds + 1):
        for case, step in steps.items():
            start = time.process_time(), time.perf_counter()
            step()
            if turn:  # the first step of each allocates
                spent[case].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    plain = [statistics.median(times) for times in zip(*spent["plain"], strict=True)]
    print(f"{arguments.rows} + {arguments.rows} images of {arguments.size}x{arguments.size}, "
          f"{torch.get_num_threads()} thread(s), medians of {arguments.rounds} steps")
    for case, times in spent.items():
        cpu, wall = (statistics.median(values) for values in zip(*times, strict=True))
        memory = f", peak {peak(case, arguments):.0f} MiB" if arguments.memory else ""
        print(f"{case}: {1e3 * cpu:.0f} ms of processor time, {cpu / plain[0]:.2f} x plain "
              f"(wall {wall / plain[1]:.2f} x){memory}")


if __name__ == "__main__":
    main()
