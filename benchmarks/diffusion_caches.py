"""What the simulated attack costs with and without cached latents and text embeddings, and what the caches save.

    OMP_NUM_THREADS=1 python benchmarks/diffusion_caches.py [--shrink 4] [--size 256] [--rows 2] [--rounds 5] [--memory]

Stable Diffusion 1.5's own networks at random weights, every width divided by --shrink (1: the full size): UNet, VAE
and CLIP text encoder. Without caches, pixels go through the VAE and token ids through the text encoder whenever a
batch is asked for, as in diffusers' text-to-image example; with them, both are encoded once, before the first step. The
plain step is the loop of that example on one batch that holds the retain and the harmful rows of our step. Both ways
of a step start from one state, and the first loss and gradient norm of ours are compared: caches change no number.
Steps of all cases alternate; medians over rounds of processor time, wall time beside it. Peak memory is that of a
process of its own per case; with caches, the VAE and the text encoder are dropped after encoding.
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
from memory import highest_resident
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from hf_immunize.diffusion import LatentBatch, LatentDataset
from hf_immunize.training.diffusion import DiffusionImmunizationConfig, DiffusionImmunizationTrainer

CASES = {
    f"{step}, {how}": (step, how) for step in ("plain", "simulated_attack") for how in ("cached", "encoded every time")
}
TOKENS, WORDS, IMAGES = 77, 49408, 16


def networks(shrink: int, size: int) -> tuple[diffusers.UNet2DConditionModel, Callable[[Tensor, Tensor], tuple]]:
    """UNet, and what encodes pixels and token ids."""
    torch.manual_seed(0)
    groups = 32 // min(shrink, 2)
    unet = diffusers.UNet2DConditionModel(
        sample_size=size // 8, cross_attention_dim=768 // shrink, attention_head_dim=8, norm_num_groups=groups,
        block_out_channels=tuple(width // shrink for width in (320, 640, 1280, 1280)),
    )
    vae = diffusers.AutoencoderKL(
        latent_channels=4, norm_num_groups=groups, layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(width // shrink for width in (128, 256, 512, 512)),
    ).requires_grad_(False).eval()
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=WORDS, hidden_size=768 // shrink, intermediate_size=3072 // shrink, num_hidden_layers=12,
        num_attention_heads=12 // shrink, max_position_embeddings=TOKENS,
    )).requires_grad_(False).eval()

    @torch.no_grad()
    def encode(pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor, text(ids)[0]

    return unet, encode


class Encoded(LatentDataset):
    """Rows that are encoded whenever they are asked for; random pixels and token ids."""

    def __init__(self, encode: Callable, size: int, label: int):
        drawn = torch.Generator().manual_seed(label)
        self.pixels = torch.rand(IMAGES, 3, size, size, generator=drawn) * 2 - 1
        self.ids = torch.randint(WORDS, (IMAGES, TOKENS), generator=drawn)
        self.encode = encode
        sample, words = encode(self.pixels[:1], self.ids[:1])
        labels = torch.full((IMAGES,), label)
        # placeholders of the right shapes: what is checked before the first step
        super().__init__(sample.expand(IMAGES, -1, -1, -1), {"encoder_hidden_states": words.expand(IMAGES, -1, -1)},
                         labels, ["retain", "harmful"])

    def batch(self, rows: Tensor) -> LatentBatch:
        """Rows by index, encoded now."""
        latents, words = self.encode(self.pixels[rows], self.ids[rows])
        return LatentBatch(latents, {"encoder_hidden_states": words}, self.labels[rows])

    def cached(self) -> LatentDataset:
        """The same rows, encoded once."""
        parts = [self.batch(rows) for rows in torch.arange(IMAGES).split(4)]
        words = {"encoder_hidden_states": torch.cat([part.conditions["encoder_hidden_states"] for part in parts])}
        return LatentDataset(torch.cat([part.latents for part in parts]), words, self.labels, self.label_names)


def plain_step(unet: torch.nn.Module, parts: list[LatentDataset], rows: int) -> Callable[[], None]:
    """One step of diffusers' text-to-image example on 2·rows images."""
    scheduler = diffusers.DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.train().parameters(), 1e-5)

    def step() -> None:
        drawn = [part.batch(torch.randint(IMAGES, (rows,))) for part in parts]
        clean = torch.cat([batch.latents for batch in drawn])
        words = torch.cat([batch.conditions["encoder_hidden_states"] for batch in drawn])
        noise, told = torch.randn_like(clean), torch.randint(1000, (len(clean),))
        answer = unet(scheduler.add_noise(clean, noise, told), told, words, return_dict=False)[0]
        torch.nn.functional.mse_loss(answer, noise).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def build(case: str, arguments: argparse.Namespace) -> tuple[Callable[[], None], list[float]]:
    """A step of one case, and numbers of its first one that do not depend on how rows are encoded."""
    kind, how = CASES[case]
    unet, encode = networks(arguments.shrink, arguments.size)
    parts = [Encoded(encode, arguments.size, label) for label in (0, 1)]
    if how == "cached":
        parts = [part.cached() for part in parts]
    if kind == "plain":
        return plain_step(unet, parts, arguments.rows), []
    trainer = DiffusionImmunizationTrainer(
        unet, diffusers.DDPMScheduler(),
        DiffusionImmunizationConfig(
            tempfile.mkdtemp(), objective="simulated_attack", attacker_steps=4, attacker_learning_rate=1e-5,
            per_device_train_batch_size=arguments.rows, per_device_harmful_batch_size=arguments.rows, use_cpu=True,
            disable_progress=True, logging_steps=1000,
        ),
        train_dataset=parts[0], harmful_dataset=parts[1],
    )
    trainer._measure_base()
    trainer.compute_gradients()
    norm = torch.nn.utils.get_total_norm([p.grad for p in unet.parameters() if p.grad is not None])
    (attack,) = trainer.terms.weight_terms.objectives.values()
    return trainer._take_step, [attack.ceiling, float(norm)]


def peak(case: str, arguments: argparse.Namespace) -> float:
    """MiB of a process that makes two steps of one case."""
    words = [f"--{name}={getattr(arguments, name)}" for name in ("shrink", "size", "rows")]
    done = subprocess.run([sys.executable, __file__, *words, "--peak", case], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shrink", type=int, default=4, choices=[1, 2, 4])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="Measure peak memory too.")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        step = build(arguments.peak, arguments)[0]
        for _ in range(2):
            step()
        print(highest_resident())
        return
    steps, first = {}, {}
    for case in tqdm(CASES, desc="build", unit="case"):
        steps[case], first[case] = build(case, arguments)
    once, every = (first[f"simulated_attack, {how}"] for how in ("cached", "encoded every time"))
    spent: dict[str, list[tuple[float, float]]] = {case: [] for case in steps}
    for turn in tqdm(range(arguments.rounds + 1), desc="measure", unit="round"):
        for case, step in steps.items():
            start = time.process_time(), time.perf_counter()
            step()
            if turn:  # the first step of each allocates
                spent[case].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    medians = {
        case: [statistics.median(column) for column in zip(*times, strict=True)] for case, times in spent.items()
    }
    rows, size = arguments.rows, arguments.size
    print(f"Stable Diffusion 1.5 with widths / {arguments.shrink}, {rows} + {rows} images of {size}x{size}, "
          f"{torch.get_num_threads()} thread(s), medians of {arguments.rounds} steps")
    print("base loss x ceiling and gradient norm, cached and not: "
          + ", ".join(f"{a:.6g} and {b:.6g}" for a, b in zip(once, every, strict=True)))
    for case, (cpu, wall) in medians.items():
        kind, how = CASES[case]
        plain, other = medians[f"plain, {how}"], medians[f"{kind}, encoded every time"]
        memory = f", peak {peak(case, arguments):.0f} MiB" if arguments.memory else ""
        print(f"{case}: {1e3 * cpu:.0f} ms of processor time, {cpu / plain[0]:.2f} x plain {how} (wall "
              f"{wall / plain[1]:.2f}), {cpu / other[0]:.2f} x itself encoded every time (wall {wall / other[1]:.2f})"
              f"{memory}")


if __name__ == "__main__":
    main()
