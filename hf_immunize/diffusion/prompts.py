"""Text-to-image tasks: what a model keeps, a concept it shall not learn, a benign one, as folders with prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_immunize.data import parse_fractions, split_few_by_content
from hf_immunize.data.fingerprint import digest_pixels
from hf_immunize.diffusion.encoding import check_pipeline, encode, encode_prompt
from hf_immunize.diffusion.examples import LatentDataset
from hf_immunize.diffusion.photos import read_pixels
from hf_immunize.errors import DataError

SIDES = ("retain", "harmful", "benign")


@dataclass
class PromptArguments:
    """Folders of images, each with a prompt. The same values belong in every stage."""

    retain_images: str = field(metadata={"help": "Folder of images the model draws and must keep."})
    harmful_images: str = field(metadata={"help": "Folder of images of the concept it shall not learn."})
    retain_prompt: str = field(metadata={"help": "Prompt of the retained images (DiT: name or number of the class)."})
    harmful_prompt: str = field(metadata={"help": "Prompt of the concept, e.g. 'a photo of sks person'."})
    benign_images: str | None = field(
        default=None, metadata={"help": "Folder of images of a concept it should learn as easily as the base."}
    )
    benign_prompt: str | None = field(default=None, metadata={"help": "Prompt of the benign concept."})
    other_images: str | None = field(
        default=None,
        metadata={"help": "Folder of other photos of the harmful concept, which one of the attackers trains on."},
    )
    other_prompt: str | None = field(
        default=None, metadata={"help": "Another description of the concept, e.g. 'a portrait of sks'."}
    )
    placeholder_prompt: str | None = field(
        default=None, metadata={"help": "A prompt with a token that means nothing, e.g. 'a photo of ohwx'."}
    )
    generic_prompt: str | None = field(
        default=None, metadata={"help": "A prompt that says no more than what kind of thing it is, e.g. 'a photo'."}
    )
    resolution: int = field(default=512, metadata={"help": "Side of the images in pixels, a multiple of 16."})
    retain_splits: str = field(
        default="train=0.8,validation=0.1,test=0.1", metadata={"help": "Splits of the retained images by content."}
    )
    concept_splits: str = field(
        default="defense=0.35,attack=0.35,validation=0.1,test=0.2",
        metadata={"help": "Splits of a concept by content: defense is all that the immunizer may see."},
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the splits."})


class PromptTask:
    """The folders, split by content and encoded by a pipeline on demand.

    Raises:
        ModelError: a pipeline that cannot be told prompts (see ``PROMPT_ENCODERS``).
        DataError: from every method: no or unreadable images, fewer than there are splits, or no prompt.
    """

    source = "folders of images"

    def __init__(self, arguments: PromptArguments, pipeline: Any):
        check_pipeline(pipeline)
        self._arguments, self._pipeline = arguments, pipeline
        self._read, self._encoded = cache(self._read), cache(self._encoded)

    @property
    def sides(self) -> tuple[str, ...]:
        """``retain``, ``harmful``, and ``benign`` where there are images of it."""
        return SIDES if self._arguments.benign_images is not None else SIDES[:2]

    def examples(self, side: str, split: str) -> LatentDataset:
        """Encoded images of one split under the prompt of their side."""
        pixels, rows = self._read(side)
        if split not in rows:
            raise DataError(f"expected a split of {side} in {sorted(rows)}, got {split!r}.")
        return self._encoded(side).subset(torch.tensor(rows[split]))

    def attacker_knows(self, concept: str) -> dict[str, Any]:
        """What an attacker holds beside images of the concept, as DiffusionAttackContext takes it."""
        given, size = self._arguments, self._arguments.resolution
        pixels, rows = self._read(concept)
        known: dict[str, Any] = {"pixels": pixels[rows["attack"]], "prior": self.examples("retain", "validation")}
        for name in ("other", "placeholder", "generic"):
            prompt = getattr(given, f"{name}_prompt")
            if prompt is not None:
                known[name] = encode_prompt(self._pipeline, prompt, size)
        if given.other_images is not None and concept == "harmful":
            known["other_images"] = encode(
                self._pipeline, read_pixels(given.other_images, size), given.harmful_prompt, SIDES.index(concept), SIDES
            )
        return known

    def described(self) -> dict[str, Any]:
        """The arguments without local paths: folders by their last name."""
        values = vars(self._arguments)
        return {name: Path(value).name if name.endswith("_images") and value else value
                for name, value in values.items()}

    def _read(self, side: str) -> tuple[Tensor, dict[str, list[int]]]:
        """All pixels of a side, and the rows of its splits."""
        folder = getattr(self._arguments, f"{side}_images")
        if folder is None:
            raise DataError(f"expected a folder of images of the {side} concept, got none: set {side}_images.")
        pixels = read_pixels(folder, self._arguments.resolution)
        splits = self._arguments.retain_splits if side == "retain" else self._arguments.concept_splits
        digests = [digest_pixels(row.numpy()) for row in pixels]
        return pixels, split_few_by_content(digests, parse_fractions(splits), seed=self._arguments.split_seed)

    def _encoded(self, side: str) -> LatentDataset:
        pixels, _ = self._read(side)
        return encode(
            self._pipeline, pixels, getattr(self._arguments, f"{side}_prompt") or "", SIDES.index(side), list(SIDES)
        )
