"""What is trained and what is frozen; activations where the frozen part ends, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from hf_immunize.data import RowStore, forward_rows
from hf_immunize.errors import ConfigError, DataError
from hf_immunize.features import Boundary, find_boundary, lying_channels_last, trainable_modules
from hf_immunize.training.core.distributed import world
from hf_immunize.training.core.sharding import first_rank_where, is_sharded, whole
from hf_immunize.training.vision.counting import digest_once

_FORMAT = 3
"""Part of every cache key; raised when what is stored changes its meaning."""
_STORED = {"bf16": torch.bfloat16}
"""How floating-point activations lie on disk by precision; as they were computed where it is not named."""


def freeze_all_but(model: nn.Module, patterns: str) -> list[str]:
    """Leave only the parameters under the matching modules trainable; returns these modules' names.

    Raises:
        ModelError: a pattern that fits nothing.
        ConfigError: modules without parameters.
    """
    names = trainable_modules(model, patterns)
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"expected modules with parameters for trainable_modules, got {names}: choose others.")
    return names


class FrozenPart:
    """The part of a model that runs before anything trainable: always in evaluation mode, and skipped when cached.

    ``boundary`` is None when everything trains or the network has no such point; then nothing is skipped.
    """

    def __init__(self, model: nn.Module, image: torch.Size):
        frozen = any(not parameter.requires_grad for parameter in model.parameters())
        dtype = next(model.parameters()).dtype
        self.boundary: Boundary | None = find_boundary(model, image, dtype=dtype) if frozen else None

    def hold(self, model: nn.Module) -> None:
        """Put the frozen part into evaluation mode: cached or not, it computes the same."""
        for name in self.boundary.skipped if self.boundary else ():
            model.get_submodule(name).eval()

    @contextmanager
    def entered(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What to call the model with: inputs as they are, or such that the forward starts at cached activations."""
        if "boundary" not in inputs:
            yield inputs
            return
        assert self.boundary is not None
        rest = {name: value for name, value in inputs.items() if name not in ("boundary", "teacher_logits")}
        with self.boundary.replay(model, inputs["boundary"]) as pixels:
            yield {"pixel_values": pixels, **rest}


class BoundaryDataset(Dataset[dict[str, Any]]):
    """Cached activations and labels in the place of images.

    Args:
        store: activations, a column for each tensor that crosses the boundary.
        labels: one per row.
        teacher: θ₀'s logits.
        dtypes: of the activations as they are handed out; as they lie on disk if not given.
    """

    def __init__(
        self, store: RowStore, labels: Sequence[int] | Tensor, teacher: RowStore | None = None,
        dtypes: Sequence[torch.dtype] | None = None,
    ):  # fmt: skip
        self.store, self.teacher, self._dtypes = store, teacher, dtypes
        self.labels = torch.as_tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        activations = self.store[row]
        if self._dtypes is not None:
            activations = tuple(one.to(dtype) for one, dtype in zip(activations, self._dtypes, strict=True))
        found = {"boundary": activations, "labels": self.labels[row]}
        return found if self.teacher is None else found | {"teacher_logits": self.teacher[row][0]}


def collate_with_boundary(collate: Callable[..., Any]) -> Callable[..., Any]:
    """A collator that stacks cached rows, and leaves rows with images to ``collate``."""

    def collated(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if "boundary" not in rows[0]:
            return collate(rows)
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "boundary"}
        activations = [row["boundary"] for row in rows]
        return batch | {"boundary": tuple(torch.stack(parts) for parts in zip(*activations, strict=True))}

    return collated


class FeatureCache:
    """Boundary activations of whole datasets under one folder, keyed by weights, boundary, precision and pixels.

    They are computed as training computes them, under ``autocast``, and stored in ``precision``: with bf16 every
    floating-point activation takes two bytes on disk, and is handed out in the dtype that the forward had there. A
    residual stream, which autocast keeps in float32, is rounded to 8 bits of mantissa by that: as much as every matrix
    product after it rounds its inputs.

    Args:
        folder: where caches lie; None for ``default_folder()``.
        model, boundary: the network and where its frozen part ends.
        collate: makes batches of images.
        precision: ``accelerator.mixed_precision``.
        autocast: ``accelerator.autocast``.
        batch_size: images at a time.
    """

    def __init__(
        self,
        folder: str | None,
        model: nn.Module,
        boundary: Boundary,
        collate: Callable[..., Any],
        precision: str,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        batch_size: int | None = None,
    ):
        self._folder = Path(folder) if folder else default_folder()
        self._model, self._boundary, self._collate = model, boundary, collate
        device = next(model.parameters()).device
        self._autocast, self._batch = autocast, batch_size or forward_rows(boundary.image, device)
        self._narrowed, self._dtypes = _STORED.get(precision), self._computed_dtypes(device)
        kept = [str(self._narrow(torch.empty(0, dtype=dtype)).dtype) for dtype in self._dtypes]
        digest = hashlib.sha256(f"{_FORMAT} {boundary.name} {tuple(boundary.image)} {precision} {kept}".encode())
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        named = sorted(model.state_dict().items())
        # What is trained lies behind the boundary: one trunk's activations serve every head. Logits are the model's.
        self._key = _digested(digest, [pair for pair in named if pair[0] not in trained])
        self._logits_key = _digested(digest, [pair for pair in named if pair[0] in trained])

    def dataset(
        self, rows: Any, labels: Sequence[int] | Tensor, name: str, *, teacher: bool = False
    ) -> BoundaryDataset:
        """The cached form of a dataset of ``{"pixel_values", "labels"}`` rows; computed if it is not there.

        Raises:
            DataError: rows with other columns, or that are not the same when read twice.
            RecordError: no space on disk, or a damaged cache.
        """
        check_repeatable(rows, name)
        content = digest_once(rows, name)
        key, logits_key = (_short(f"{part} {content}") for part in (self._key, self._logits_key))
        store = self._stored(self._folder / key, partial(self._activations, rows, name), len(rows))
        logits = None
        if teacher:
            folder = self._folder / f"{logits_key}-logits"
            logits = self._stored(folder, partial(self._logits, store, name), len(rows))
        return BoundaryDataset(store, labels, logits, self._dtypes)

    def _computed_dtypes(self, device: torch.device) -> tuple[torch.dtype, ...]:
        """What the forward hands to the boundary, by one blank image."""
        blank = torch.zeros(1, *self._boundary.image, device=device, dtype=next(self._model.parameters()).dtype)
        return tuple(row.dtype for _ in self._evaluating((0,), "") for row in self._boundary.rows(self._model, blank))

    def _narrow(self, activations: Tensor) -> Tensor:
        """As they are stored; masks and indices stay what they are, and nothing is widened."""
        wide = activations.is_floating_point() and self._narrowed is not None
        return activations.to(self._narrowed) if wide and activations.element_size() > 2 else activations

    def _stored(self, folder: Path, batches: Callable[[], Iterator[tuple[Tensor, ...]]], rows: int) -> RowStore:
        """The store, written if it is not there; a model that is split over ranks answers to all of them at once."""
        if not is_sharded(self._model):
            return RowStore.open_or_write(folder, batches(), rows)
        # On machines without a common disk one after the other writes.
        while (writer := first_rank_where(RowStore.open(folder) is None)) is not None:
            left = batches()
            if world()[0] == writer:
                RowStore.open_or_write(folder, left, rows)
            for _ in left:  # the writer has none, unless another run has just written the same
                pass
            dist.barrier()
        return RowStore.open_or_write(folder, iter(()), rows)

    def _activations(self, rows: Any, name: str) -> Iterator[tuple[Tensor, ...]]:
        loader = DataLoader(rows, batch_size=self._batch, collate_fn=self._collate)
        device = next(self._model.parameters()).device
        for batch in self._evaluating(loader, f"frozen features of {name}"):
            found = self._boundary.rows(self._model, batch["pixel_values"].to(device))
            yield tuple(self._narrow(part) for part in found)

    def _logits(self, store: RowStore, name: str) -> Iterator[tuple[Tensor, ...]]:
        device = next(self._model.parameters()).device
        starts = range(0, len(store), self._batch)
        for start in self._evaluating(starts, f"logits of {name}"):
            rows = [store[row] for row in range(start, min(start + self._batch, len(store)))]
            parts = (torch.stack(column) for column in zip(*rows, strict=True))
            stacked = tuple(part.to(device, dtype) for part, dtype in zip(parts, self._dtypes, strict=True))
            with self._boundary.replay(self._model, stacked) as pixels:
                yield (self._model(pixel_values=pixels).logits.float(),)

    def _evaluating(self, parts: Any, words: str) -> Iterator[Any]:
        """Each of ``parts`` under no_grad, autocast and evaluation mode, with a progress bar."""
        was_training = self._model.training
        with lying_channels_last(self._model) as model:
            model.eval()
            try:
                for part in tqdm(parts, desc=words, leave=False, disable=None if words else True):
                    with torch.no_grad(), self._autocast():
                        yield part
            finally:
                model.train(was_training)


def _digested(digest: Any, named: Sequence[tuple[str, Tensor]]) -> str:
    """The digest after these tensors, which it has taken in."""
    for name, value in named:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(whole(value.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return str(digest.hexdigest())


def _short(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()[:32]


def default_folder() -> Path:
    """``hf_immunize/features`` under the Hugging Face cache."""
    from huggingface_hub import constants

    return Path(os.environ.get("HF_IMMUNIZE_CACHE", Path(constants.HF_HOME) / "hf_immunize")) / "features"


def check_repeatable(rows: Any, name: str) -> None:
    """Raise DataError for columns a cache would drop, or for a first row that changes when it is read again."""
    first, again = rows[0], rows[0]
    extra = sorted(set(first) - {"pixel_values", "labels", "label"})
    if extra:
        raise DataError(
            f"expected only pixel_values and labels in {name}, got {extra} as well: set cache_frozen_features to false."
        )
    if not torch.equal(torch.as_tensor(first["pixel_values"]), torch.as_tensor(again["pixel_values"])):
        raise DataError(
            f"expected rows of {name} that stay the same, got another image when row 0 was read again: a random "
            "transform cannot be cached. Remove it, or set cache_frozen_features to false."
        )
