"""Milliseconds an image costs in a forward without gradient, by rows of a batch and memory format, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/forward_batches.py [--size 128] [--rows 4 16 64] [--images 256] [--repeats 5]

MobileNetV2 of random weights. Medians over repeats that take turns, in processor time: what ``forward_rows`` and
``prefer_channels_last`` are for.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from transformers import MobileNetV2Config, MobileNetV2Model

from hf_immunize.data import forward_rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    pixels = torch.randn(given.images, 3, given.size, given.size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    formats = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
    models = {
        name: MobileNetV2Model(MobileNetV2Config()).eval().to(memory_format=order) for name, order in formats.items()
    }
    seconds: dict[tuple[str, int], list[float]] = {(name, rows): [] for name in models for rows in given.rows}
    with torch.no_grad():
        for model in models.values():
            model(pixel_values=pixels[: max(given.rows)])  # the first call allocates
        for _ in range(given.repeats):
            for (name, rows), found in seconds.items():
                start = time.process_time()
                for part in pixels.split(rows):
                    models[name](pixel_values=part)
                found.append(time.process_time() - start)
    print(f"forward_rows: {forward_rows(pixels.shape[1:])} rows of {given.size} px, {torch.get_num_threads()} threads")
    for (name, rows), found in seconds.items():
        print(f"{name}, {rows:4d} rows: {1000 * median(found) / given.images:.1f} ms an image")


if __name__ == "__main__":
    main()
