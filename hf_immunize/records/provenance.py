"""Where a record came from: versions, git revision, and content fingerprints of data and weights."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from hf_immunize.records.base import Part, Record
from hf_immunize.records.files import sha256_file, weight_files

HUB_SOURCE = "hub_source.json"
_PACKAGES = (
    "hf_immunize", "torch", "transformers", "diffusers", "accelerate", "peft", "datasets", "numpy", "safetensors",
    "optuna",
)


class Provenance(Part):
    """What produced a record. Holds no paths, host names or user names."""

    created: str
    """UTC date and time, ISO 8601."""
    python: str
    versions: dict[str, str]
    git_revision: str | None
    """Commit of the working tree the code ran from; null for an installed wheel."""
    git_dirty: bool | None
    device: str

    @classmethod
    def here(cls, device: str = "cpu") -> Provenance:
        """Describe the running process."""
        versions = {}
        for package in _PACKAGES:
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        revision, dirty = _git_state(Path(__file__).parent)
        now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        return cls(
            created=now.isoformat(),
            python=platform.python_version(),
            versions=versions,
            git_revision=revision,
            git_dirty=dirty,
            device=device,
        )


def _git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Commit and dirtiness of the checkout that holds ``folder``; None twice where it is no checkout of ours."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "--", "provenance.py"):  # site-packages inside somebody else's checkout is not ours
        return None, None
    status = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD"), None if status is None else bool(status)


class DatasetFingerprint(Part):
    """Identity of a data split by content: equal digests mean the same rows in the same order."""

    source: str
    """Hub id or a short description; never a local path."""
    role: str
    rows: int
    classes: dict[str, int]
    """Rows per label name."""
    sha256: str
    """SHA-256 over the row digests in order."""


class HubSource(Record):
    """Where on the Hub the files of a working folder came from; written beside them."""

    repo_id: str
    revision: str
    """Commit of the repository."""
    asked: str | None = None
    """Branch, tag or commit that was asked for; null for the main branch."""

    @classmethod
    def find(cls, folder: str | Path) -> HubSource | None:
        """The source of a folder's files; None for a folder that did not come from the Hub."""
        path = Path(folder) / HUB_SOURCE
        return cls.read(path) if path.is_file() else None


_NOTES = ("_name_or_path", "transformers_version", "_diffusers_version", "dtype", "torch_dtype")
"""Entries of configurations that change nothing: weights are loaded as float32."""


class ModelFingerprint(Part):
    """Identity of a saved model: its architecture, parameter count and the SHA-256 of each weight file."""

    name: str
    architecture: str
    parameters: int
    weights: dict[str, str]
    revision: str | None = None
    """Commit on the Hub the weights came from; null for a local model."""
    configuration: str | None = None
    """SHA-256 of the entries of config.json files that may change what the model computes; null where an earlier
    release wrote the record."""

    def is_same(self, other: ModelFingerprint) -> bool:
        """Whether both have the same weights, and the same configuration where both are known: an epsilon of 10³⁰ makes
        another model of them."""
        known = None not in (self.configuration, other.configuration)
        return self.weights == other.weights and (not known or self.configuration == other.configuration)

    @classmethod
    def of_folder(
        cls, folder: str | Path, *, name: str, architecture: str, parameters: int, source: HubSource | None = None
    ) -> ModelFingerprint:
        """Hash every safetensors file of ``folder``; a model from the Hub goes by its name there.

        Raises:
            RecordError: no safetensors file.
        """
        root = Path(folder)
        weights = {path.relative_to(root).as_posix(): sha256_file(path) for path in weight_files(root)}
        source = source or HubSource.find(root)
        return cls(
            name=source.repo_id if source else name,
            architecture=architecture,
            parameters=parameters,
            weights=weights,
            revision=source.revision if source else None,
            configuration=_configuration_of(root),
        )


def _configuration_of(root: Path) -> str | None:
    """See ``ModelFingerprint.configuration``."""
    found = {}
    for path in sorted((*root.glob("*config.json"), *root.glob("*/*config.json"))):
        name = path.relative_to(root).as_posix()
        if "processor" in name or "tokenizer" in name or "generation" in name:
            continue  # rows that they make are in the digests of data
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # a loader says what is wrong with it
        told = held if isinstance(held, dict) else {"": held}
        found[name] = {key: value for key, value in told.items() if key not in _NOTES}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() if found else None
