"""Text-to-image tasks: what a model keeps, a concept it shall not learn, a benign one, as folders with prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any

from hf_immunize.data import parse_fractions, split_few_by_content
from hf_immunize.diffusion.encoding import check_pipeline, encode, encode_prompt
from hf_immunize.diffusion.examples import LatentDataset
from hf_immunize.diffusion.photos import Photos, has_images, read_captions, read_photos
from hf_immunize.errors import DataError
from hf_immunize.options import option, required
from hf_immunize.records import DatasetFingerprint

SIDES = ("retain", "harmful", "benign")


@dataclass
class PromptArguments:
    """Folders of images, each with a prompt. The same values belong in every stage; no photo may be in two folders.

    ``metadata.jsonl`` in a folder (lines with file_name and text), or ``name.txt`` beside each image, gives each image
    a caption in place of the prompt. Sub-folders of a folder are concepts of their own.
    """

    retain_images: str = required("Folder of images the model draws and must keep.")
    harmful_images: str = required("Folder of images of the concept it shall not learn.")
    retain_prompt: str = required("Prompt of the retained images (DiT: name or number of the class).")
    harmful_prompt: str = required("Prompt of the concept, e.g. 'a photo of sks person'.")
    benign_images: str | None = option(None, "Folder of images of a concept it should learn as easily as the base.")
    benign_prompt: str | None = option(None, "Prompt of the benign concept.")
    other_images: str | None = option(None, "Folder of other photos of the harmful concept, which one of the attackers "
                                      "trains on.")
    other_prompt: str | None = option(None, "Another description of the concept, e.g. 'a portrait of sks'.")
    placeholder_prompt: str | None = option(None, "A prompt with a token that means nothing, e.g. 'a photo of ohwx'.")
    generic_prompt: str | None = option(None, "A prompt that says no more than what kind of thing it is, e.g. 'a "
                                        "photo'.")
    resolution: int = option(512, "Side of the images in pixels, a multiple of 16.")
    retain_splits: str = option("train=0.8,validation=0.1,test=0.1", "Splits of the retained images by content.")
    concept_splits: str = option("defense=0.35,attack=0.35,validation=0.1,test=0.2", "Splits of a concept by content: "
                                 "defense is all that the immunizer may see.")
    split_seed: int = option(0, "Seed of the splits.")


class PromptTask:
    """The folders, split by content and encoded by a pipeline on demand.

    Raises:
        ModelError: a pipeline that cannot be told prompts (see ``check_pipeline``).
        DataError: from every method: no or unreadable images, fewer than there are splits, no prompt, or a missing
            caption.
    """

    source = "folders of images"

    def __init__(self, arguments: PromptArguments, pipeline: Any):
        check_pipeline(pipeline)
        if arguments.resolution < 16:
            raise DataError(f"expected a resolution of at least 16 pixels, got {arguments.resolution}.")
        self._arguments, self._pipeline = arguments, pipeline
        self._split, self._encoded, self._apart = cache(self._read), cache(self._encode_split), False

    @property
    def sides(self) -> tuple[str, ...]:
        """``retain``, ``harmful``, and ``benign`` where there are images of it."""
        return SIDES if self._arguments.benign_images is not None else SIDES[:2]

    @property
    def label_names(self) -> list[str]:
        """Every concept of every side: a side's own name, or that of each sub-folder of its images."""
        return [name for side in self.sides for name, _ in self._concepts(side)]

    @property
    def judge_names(self) -> dict[str, str]:
        """A judge calls a retained concept by the name of its folder."""
        return {name: folder.name for name, folder in self._concepts("retain")}

    def examples(self, side: str, split: str) -> LatentDataset:
        """Encoded images of one split under their prompts."""
        self._check_apart()
        rows = self._split(side)[1]
        if split not in rows:
            raise DataError(f"expected a split of {side} in {sorted(rows)}, got {split!r}.")
        return self._encoded(side, split)

    def fingerprint(self, side: str, split: str) -> DatasetFingerprint:
        """Identity by content of the rows of one split."""
        return self.examples(side, split).fingerprint(source=self.source, role=f"{side} {split}")

    def attacker_knows(self, concept: str) -> dict[str, Any]:
        """What an attacker holds beside images of the concept, as DiffusionAttackContext takes it."""
        given, size = self._arguments, self._arguments.resolution
        shown, rows = self._split(concept)
        pixels, prior = shown.photos.stacked(rows["attack"]), self.examples("retain", "validation")
        known: dict[str, Any] = {"pixels": pixels, "prior": prior}
        for name in ("other", "placeholder", "generic"):
            prompt = getattr(given, f"{name}_prompt")
            if prompt is not None:
                known[name] = encode_prompt(self._pipeline, prompt, size)
        if given.other_images is not None and concept == "harmful":
            # The same concepts in the same order: names of sub-folders are those of the harmful images.
            known["other_images"] = self._encode(self._other(), "harmful")
        return known

    def _other(self) -> _Shown:
        return self._shown(self._concepts("harmful", self._arguments.other_images))

    def _check_apart(self) -> None:
        """Raise DataError for a photo in two folders: who trains on one would be judged on the other."""
        if self._apart:
            return
        seen: dict[bytes, str] = {}
        shown = [self._split(side)[0] for side in self.sides]
        if self._arguments.other_images is not None:
            other = self._other()
            shown.append(replace(other, concepts=[f"other {concept}" for concept in other.concepts]))
        for part in shown:
            for digest, concept in zip(part.digests, part.concepts, strict=True):
                first = seen.setdefault(digest, concept)
                if first != concept:
                    raise DataError(
                        f"expected each photo in one folder, got one both in those of {first!r} and of {concept!r}: "
                        "defender, attacker and exam must not share any. Remove it from one of them."
                    )
        self._apart = True

    def described(self, *_: str) -> dict[str, Any]:
        """The arguments without local paths, folders by their last name; of all sides, whichever are asked for."""
        values = vars(self._arguments)
        return {name: Path(value).name if name.endswith("_images") and value else value
                for name, value in values.items()}

    def _concepts(self, side: str, folder: str | None = None) -> list[tuple[str, Path]]:
        """Name and folder of every concept of a side."""
        named = folder or getattr(self._arguments, f"{side}_images")
        if named is None:
            raise DataError(f"expected a folder of images of the {side} concept, got none: set {side}_images.")
        root = Path(named)
        if not root.is_dir():
            raise DataError(f"expected a folder of {side} images, got {root.name!r}: check {side}_images.")
        parts = sorted(path for path in root.glob("*") if path.is_dir() and not path.name.startswith((".", "__MACOSX")))
        if parts and has_images(root):
            raise DataError(
                f"expected images or sub-folders in {root.name!r}, one for each concept, got both: move the images "
                "into sub-folders, or the sub-folders elsewhere."
            )
        return [(f"{side} {path.name}", path) for path in parts] or [(side, root)]

    def _read(self, side: str) -> tuple[_Shown, dict[str, list[int]]]:
        """All images of a side, and the rows of its splits, in each of which every concept is."""
        shown = self._shown(self._concepts(side))
        fractions = parse_fractions(
            self._arguments.retain_splits if side == "retain" else self._arguments.concept_splits
        )
        rows: dict[str, list[int]] = {split: [] for split in fractions}
        for name in dict.fromkeys(shown.concepts):
            own = [row for row, concept in enumerate(shown.concepts) if concept == name]
            digests = [shown.digests[row] for row in own]
            for split, found in split_few_by_content(digests, fractions, seed=self._arguments.split_seed).items():
                rows[split] += [own[place] for place in found]
        return shown, rows

    def _shown(self, concepts: list[tuple[str, Path]]) -> _Shown:
        channels = 1 if self._pipeline.vae.config.in_channels == 1 else 3
        parts = [
            (name, read_photos(folder, self._arguments.resolution, channels=channels), read_captions(folder))
            for name, folder in concepts
        ]
        files = [path for _, photos, _ in parts for path in photos.files]
        return _Shown(
            Photos(files, self._arguments.resolution, channels=channels),
            [caption for _, photos, captions in parts for caption in captions or repeat(None, len(photos))],
            [name for name, photos, _ in parts for _ in range(len(photos))],
            [digest for name, photos, _ in parts for digest in photos.digests(name)],
        )

    def _encode_split(self, side: str, split: str) -> LatentDataset:
        shown, rows = self._split(side)
        return self._encode(shown.subset(rows[split]), side)

    def _encode(self, shown: _Shown, side: str) -> LatentDataset:
        names, own = self.label_names, getattr(self._arguments, f"{side}_prompt") or ""
        if unknown := sorted(set(shown.concepts) - set(names)):
            raise DataError(f"expected sub-folders named like those of the {side} images, got {unknown}.")
        captions = [own if caption is None else caption for caption in shown.captions]
        labels = [names.index(name) for name in shown.concepts]
        return encode(self._pipeline, shown.photos, captions, labels, names, digests=shown.digests)


@dataclass(frozen=True)
class _Shown:
    """Images with their captions, None where the side's prompt is meant, and concepts."""

    photos: Photos
    captions: list[str | None]
    concepts: list[str]
    digests: list[bytes]
    """Of every image's pixels."""

    def subset(self, rows: Sequence[int]) -> _Shown:
        """Some of the images."""
        return _Shown(
            self.photos.subset(rows),
            [self.captions[row] for row in rows],
            [self.concepts[row] for row in rows],
            [self.digests[row] for row in rows],
        )
