"""Examples as a denoiser sees them: latents and conditions that were encoded once and kept."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_immunize.data.fingerprint import digest_pixels
from hf_immunize.data.row_store import RowStore
from hf_immunize.errors import DataError
from hf_immunize.records import DatasetFingerprint


@dataclass(frozen=True)
class LatentBatch:
    """Some rows of a LatentDataset."""

    latents: Tensor
    conditions: Mapping[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LatentBatch:
        """The batch on a device, floating-point tensors in ``dtype``."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        conditions = {name: move(value) for name, value in self.conditions.items()}
        return LatentBatch(move(self.latents), conditions, self.labels.to(device))


class PromptConditions(dict[str, Tensor]):
    """Conditions of one row, by the denoiser's names, known by the prompt they were made of.

    Encoders round differently from processor to processor, and from one layout of their weights to another: ``digest``
    is the SHA-256 of the prompt, not of what an encoder made of it.
    """

    def __init__(self, conditions: Mapping[str, Tensor], prompt: str):
        super().__init__(conditions)
        self.digest = hashlib.sha256(prompt.encode()).hexdigest()


class LatentDataset:
    """Latents (N×C×H×W; pixels in −1..1 for a model without a VAE), one row of each condition, and a concept label.

    ``digests`` says what the rows are made of, by row. With them the fingerprint is that of images and prompts, and
    does not depend on how a machine rounds when it encodes them; without them it is that of the tensors.

    Tensors may be memory-mapped (``stored``): a batch reads the rows it holds and no others.

    Raises:
        DataError: no rows, rows that do not match, values that are not finite, or a label without a name.
    """

    def __init__(
        self,
        latents: Tensor,
        conditions: Mapping[str, Tensor],
        labels: Tensor,
        label_names: Sequence[str],
        name: str = "",
        digests: Sequence[str] | None = None,
        *,
        known_finite: bool = False,
    ):
        where = f" in {name}" if name else ""
        if latents.dim() != 4 or len(latents) == 0:
            raise DataError(f"expected N x C x H x W latents, N at least 1{where}, got {tuple(latents.shape)}.")
        lengths = {key: len(value) for key, value in {**conditions, "labels": labels}.items()}
        lengths |= {} if digests is None else {"digests": len(digests)}
        if set(lengths.values()) != {len(latents)}:
            raise DataError(f"expected {len(latents)} rows of every condition{where}, got {lengths}: check captions.")
        for key, value in {} if known_finite else {"latents": latents, **conditions}.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise DataError(f"expected finite {key}{where}, got NaN or infinity: check the images and the VAE.")
        if int(labels.min()) < 0 or int(labels.max()) >= len(label_names):
            raise DataError(f"expected labels in 0..{len(label_names) - 1}{where}, got {int(labels.max())}.")
        self.latents, self.conditions, self.labels = latents, dict(conditions), labels
        self.label_names = list(label_names)
        self.digests = None if digests is None else list(digests)

    @classmethod
    def stored(
        cls, store: RowStore, names: Sequence[str], labels: Tensor, label_names: Sequence[str], name: str = "",
        *, digests: Sequence[str] | None = None, shared: Mapping[str, Tensor] | None = None,
    ) -> LatentDataset:
        """Rows that lie on disk: latents in the store's first column, then the conditions called ``names``.

        What is in a store was checked when it was written.

        Args:
            shared: conditions that all rows have in common, one row each.
        """
        conditions = {key: store.column(1 + place) for place, key in enumerate(names)}
        conditions |= {key: value.expand(len(store), *value.shape[1:]) for key, value in (shared or {}).items()}
        return cls(store.column(0), conditions, labels, label_names, name, digests, known_finite=True)

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, rows: Tensor) -> LatentBatch:
        """Rows by index."""
        conditions = {name: value[rows] for name, value in self.conditions.items()}
        return LatentBatch(self.latents[rows], conditions, self.labels[rows])

    def subset(self, rows: Tensor) -> LatentDataset:
        """A dataset of some rows."""
        batch = self.batch(rows)
        known = None if self.digests is None else [self.digests[row] for row in rows.tolist()]
        return LatentDataset(batch.latents, batch.conditions, batch.labels, self.label_names, digests=known)

    def rows_in_turn(self, count: int) -> Tensor:
        """``count`` rows that go through the classes in turn, rows of a class repeated where there are too few."""
        classes = [torch.nonzero(self.labels == label).flatten() for label in self.labels.unique()]
        turns = (divmod(place, len(classes)) for place in range(count))
        return torch.stack([classes[of][turn % len(classes[of])] for turn, of in turns])

    def row_digests(self) -> list[str]:
        """Identity of every row: its digest, else that of latents and conditions."""
        if self.digests is not None:
            return self.digests
        names = sorted(self.conditions)
        return [
            hashlib.sha256(digest_pixels(self.latents[row].numpy()) + b"".join(
                name.encode() + digest_pixels(self.conditions[name][row].numpy()) for name in names)).hexdigest()
            for row in range(len(self))
        ]

    def fingerprint(self, *, source: str, role: str) -> DatasetFingerprint:
        """Identity by content of every row, in order: its digest, else latents and conditions; and its label."""
        digest = hashlib.sha256()
        for known, label in zip(self.row_digests(), self.labels.tolist(), strict=True):
            digest.update(f"{known}{label}".encode())
        counts = Counter(self.labels.tolist())
        classes = {name: counts[label] for label, name in enumerate(self.label_names) if counts[label]}
        return DatasetFingerprint(source=source, role=role, rows=len(self), classes=classes, sha256=digest.hexdigest())
