"""The rows of one optimizer step: primary micro-batches, each with its harmful batch, changed at random if asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_immunize.data import augment, parse_augmentation
from hf_immunize.training.vision.config import ImmunizationConfig
from hf_immunize.training.vision.harmful_stream import HarmfulStream


def with_harmful(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A harmful batch with its classes also as numbers, which are not moved to the device."""
    return {**batch, "classes": batch["labels"].tolist()}


def rows_of_step(
    samples: Sequence[Mapping[str, Any]], stream: HarmfulStream, args: ImmunizationConfig, step: int
) -> list[dict[str, Any]]:
    """Primary micro-batches of optimizer step ``step`` (from 0), each with its harmful batch attached."""
    first = step * args.gradient_accumulation_steps
    joined = [{**sample, "harmful": with_harmful(stream.batch(first + i))} for i, sample in enumerate(samples)]
    if not args.augmentation:
        return joined
    return [_augmented(sample, args, place, step) for place, sample in enumerate(joined)]


def _augmented(sample: dict[str, Any], args: ImmunizationConfig, place: int, step: int) -> dict[str, Any]:
    """Both tasks' images changed by draws of their place in the global step, whoever holds them.

    Primary rows reach ranks in consecutive blocks, harmful ones in turn (StepBatchSampler).
    """
    assert args.augmentation is not None
    names = parse_augmentation(args.augmentation)
    rank, size = args.process_index, args.world_size
    base = args.data_seed if args.data_seed is not None else args.seed

    def changed(batch: dict[str, Any], side: int, places: list[int], drawn_at: int) -> dict[str, Any]:
        seeds = [(((base * 2 + side) * 1_000_003 + drawn_at) * 1_000_003 + row) for row in places]
        pixels = batch["pixel_values"]
        return {**batch, "pixel_values": augment(pixels.cpu(), names, seeds).to(pixels.device)}

    count, harmful = len(sample["pixel_values"]), sample["harmful"]
    blocks = [(place * size + rank) * args.per_device_train_batch_size + row for row in range(count)]
    rows = len(harmful["pixel_values"])
    turns = [(place * rows + row) * size + rank for row in range(rows)]
    whole = {name: value for name, value in sample.items() if name != "harmful"}
    return changed(whole, 0, blocks, step) | {"harmful": changed(harmful, 1, turns, step)}
