"""What an attacker holds: a saved model, the attacker's own data, and seeded draws that are paired across models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from hf_immunize.attacks.core.means import check_means
from hf_immunize.attacks.core.parts import with_fewer
from hf_immunize.attacks.core.shape import Role
from hf_immunize.data import PixelDataset, batches, forward_rows
from hf_immunize.data import fingerprint as fingerprint_rows
from hf_immunize.errors import CaptureError, ConfigError, DataError, ModelError
from hf_immunize.exam.means import Means
from hf_immunize.features import extract_features, find_classifier, prefer_channels_last
from hf_immunize.models import load_on_base, random_classifier
from hf_immunize.records import DatasetFingerprint, ModelFingerprint, fingerprint_of, sha256_file, weight_files

PIXELS = "pixels"
THUMBNAIL = 32


def describe_model(folder: str | Path, model: nn.Module, role: Role = "subject") -> ModelFingerprint:
    """Fingerprint of the attacked model. Random weights (``scratch``) have no weight files: each seed draws its own."""
    if role == "nothing":
        return ModelFingerprint(name="no model", architecture="none", parameters=0, weights={})
    name = Path(folder).resolve().name
    parameters = sum(parameter.numel() for parameter in model.parameters())
    architecture = type(model).__name__
    if role == "scratch":
        return ModelFingerprint(
            name=f"{name} architecture, random weights", architecture=architecture, parameters=parameters, weights={}
        )
    return ModelFingerprint.of_folder(folder, name=name, architecture=architecture, parameters=parameters)


@dataclass(frozen=True)
class AttackContext:
    """One attacked model and the attacker's three splits.

    Args:
        folder: the model's save_pretrained folder (for role ``scratch`` only its config is read).
        role: which side of the exam the model is.
        attack, validation, test: harmful data to train on, to choose hyperparameters on, and to be judged on.
        data: fingerprints of these three splits, in that order.
        feature_module: the head, i.e. the layer whose input is probed; found automatically when None.
        device: where models run.
        attack_fraction: share of each class of ``attack`` that one seed trains on.
        base: the un-immunized model, where the attacker of this exam holds it too; given for every role or for none.
        benign: benign data, where the attacker mixes some in.
        adapter_base: where ``folder`` holds a PEFT adapter, the folder of the model that it is put on.
        means: what networks are trained with; the same for every role.
    """

    folder: Path
    role: Role
    attack: PixelDataset
    validation: PixelDataset
    test: PixelDataset
    data: tuple[DatasetFingerprint, ...]
    feature_module: str | None = None
    device: str = "cpu"
    attack_fraction: float = 0.8
    base: Path | None = None
    benign: PixelDataset | None = None
    adapter_base: Path | None = None
    means: Means = Means()
    prepared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What attacks prepare once for all of their runs, by a key of their own (``once``)."""
    _features: dict[tuple[int | None, str], dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ConfigError(f"expected a role out of {', '.join(get_args(Role))}, got {self.role!r}.")
        if not 0 < self.attack_fraction <= 1:
            raise ConfigError(f"expected attack_fraction in (0, 1], got {self.attack_fraction}.")
        check_means(self.means, self.device)
        digests = [fingerprint.sha256 for fingerprint in self.data]
        if len(set(digests)) < len(digests):
            raise DataError(
                "expected different attack, validation and test splits, got one split twice: an attacker who trains "
                "on the test rows measures nothing. Check harmful_splits."
            )

    @property
    def classes(self) -> int:
        """Number of harmful classes."""
        return len(self.attack.label_names)

    @cached_property
    def _saved(self) -> nn.Module:
        return load_on_base(self.folder, self.adapter_base)

    @cached_property
    def fingerprint(self) -> ModelFingerprint:
        """Identity of the attacked weights, as they lie on disk now."""
        return describe_model(self.folder, self._saved, self.role)

    @cached_property
    def base_digest(self) -> str:
        """SHA-256 over the digests of the base's weight files."""
        if self.base is None:
            raise ModelError("expected a base model for an attack that compares with it, got none: pass --base_path.")
        return fingerprint_of({path.name: sha256_file(path) for path in weight_files(self.base)})

    @cached_property
    def benign_digest(self) -> str:
        """Content digest of the benign data."""
        if self.benign is None:
            raise DataError("expected benign data for an attack that mixes some in, got none: set benign_dataset.")
        return fingerprint_rows(self.benign, source="", role="").sha256

    def holding(self, need: str) -> str | None:
        """Digest of what the attacker holds under this name beside model and harmful data; None for nothing."""
        if getattr(self, need) is None:
            return None
        return self.base_digest if need == "base" else self.benign_digest

    @cached_property
    def head(self) -> str:
        """Module name of the classification head; what stands for features where there is no model."""
        if self.role == "nothing":
            return PIXELS
        return self.feature_module or find_classifier(self._saved)

    @property
    def described(self) -> dict[str, Any]:
        """What a trace says about the exam beside the attack's own settings."""
        return {"attack_fraction": self.attack_fraction, "feature_module": self.head, **self.means.described}

    def model(self, seed: int) -> nn.Module:
        """A fresh copy of the attacked model on ``device``; ``seed`` matters only for random weights."""
        anew = self.role == "scratch"
        made = random_classifier(self.folder, seed, as_usual=True) if anew else copy.deepcopy(self._saved)
        return prefer_channels_last(made.to(self.device))

    def once(self, what: str, seed: int, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, made once per attacked model: random weights are another model for every seed."""
        key = (what, seed if self.role == "scratch" else None)
        if key not in self.prepared:
            self.prepared[key] = make()
        return self.prepared[key]

    def model_with_new_head(self, seed: int) -> nn.Module:
        """The attacked model with a freshly drawn head for the harmful classes. Equal seeds draw equal heads.

        Raises:
            ModelError: the head is not a linear layer.
        """
        return self.with_new_head(self.model(seed), seed)

    def with_new_head(self, model: nn.Module, seed: int, also: Sequence[str] = ()) -> nn.Module:
        """Any model of this architecture, its head drawn anew for the harmful classes, and for those named ``also``."""
        names = [*self.attack.label_names, *also]
        old = model.get_submodule(self.head)
        if not isinstance(old, nn.Linear):
            raise ModelError(
                f"expected a linear head to replace at '{self.head}', got {type(old).__name__}: set feature_module to "
                "the model's last linear layer."
            )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            new: Any = nn.Linear(old.in_features, len(names), device=old.weight.device, dtype=old.weight.dtype)
        new.is_new_head = True  # what an optimizer may give a rate of its own
        model.set_submodule(self.head, new)
        changed: Any = model
        changed.config.id2label = dict(enumerate(names))
        changed.config.label2id = {name: label for label, name in enumerate(names)}
        changed.config.problem_type = "single_label_classification"
        if hasattr(changed, "num_labels"):
            changed.num_labels = len(names)
        return model

    def draw_rows(self, seed: int) -> Tensor:
        """Rows of ``attack`` that this seed trains on: the same share of every class, at least one row each."""
        generator = torch.Generator().manual_seed(seed)
        kept = []
        for label in range(self.classes):
            rows = (self.attack.labels == label).nonzero().flatten()
            share = min(len(rows), max(1, round(self.attack_fraction * len(rows))))
            kept.append(rows[torch.randperm(len(rows), generator=generator)[:share]])
        return torch.cat(kept).sort().values

    def features(self, seed: int, module: str | None = None) -> dict[str, Tensor]:
        """Features of the whole ``attack``, ``validation`` and ``test`` splits at a module (default: the head).

        Computed once per model; random weights are another model for every seed.
        """
        module = module or self.head
        if self.role == "nothing":
            return self._pixels
        key = (seed if self.role == "scratch" else None, module)
        if key not in self._features:
            self._features[key] = self.features_of(self.model(seed), module)
        return self._features[key]

    @cached_property
    def _pixels(self) -> dict[str, Tensor]:
        """What an attacker without the model has: pixels, larger images averaged down to thumbnails."""
        splits = {"attack": self.attack, "validation": self.validation, "test": self.test}
        return {
            name: torch.cat([
                nn.functional.adaptive_avg_pool2d(
                    pixels := batch["pixel_values"].float(),
                    (min(pixels.shape[-2], THUMBNAIL), min(pixels.shape[-1], THUMBNAIL)),
                ).flatten(1)
                for batch in batches(split, device="cpu")
            ])
            for name, split in splits.items()
        }

    def features_of(self, model: nn.Module, module: str) -> dict[str, Tensor]:
        """Features of the three splits at a module of any model, e.g. one the attacker has changed; not kept."""
        splits = {"attack": self.attack, "validation": self.validation, "test": self.test}
        if empty := [name for name, split in splits.items() if not len(split)]:
            raise CaptureError(f"expected rows in every split to extract features from, got none in {empty}.")

        def extract(size: int) -> Tensor:
            parts = chain.from_iterable(batches(split, size) for split in splits.values())
            return extract_features(model, parts, [module])[module]

        rows = with_fewer(forward_rows(self.attack.image_shape, self.device), extract)
        return dict(zip(splits, rows.split([len(split) for split in splits.values()]), strict=True))
