"""Safe files: atomic writes, streamed SHA-256, weight files of a model folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from hf_immunize.errors import RecordError

_BLOCK = 1 << 20
LOADING_FILES = (
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "model_index.json",
    "scheduler_config.json",
    "adapter_config.json",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""Names of the files that ``from_pretrained`` reads beside the weights, in any folder of a model."""


def atomic_write(path: str | Path, content: str | bytes) -> Path:
    """Write ``content`` so that a reader sees the old file or the whole new one, never a part.

    Raises:
        RecordError: the folder cannot be written or the disk is full; the old file is left as it was.
    """
    target = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.", suffix=".part")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise RecordError(
            f"expected to write {target}, got {error.strerror or error}: free disk space or choose a writable folder."
        ) from error
    return target


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def loading_files(folder: str | Path) -> dict[str, str]:
    """SHA-256 of every file that loading reads beside the weights, by path relative to ``folder``."""
    root = Path(folder)
    found = {
        path.relative_to(root)
        for pattern in LOADING_FILES
        for path in root.rglob(pattern)
        if path.is_file() and not any(part.startswith(("checkpoint-", ".")) for part in path.relative_to(root).parts)
    }
    return {path.as_posix(): sha256_file(root / path) for path in sorted(found)}


def weight_files(folder: str | Path) -> list[Path]:
    """Every safetensors file of a model folder, checkpoints excluded, sorted by name.

    Raises:
        RecordError: no folder, or no safetensors file in it.
    """
    root = Path(folder)
    found = sorted(
        path
        for path in root.rglob("*.safetensors")
        if not any(part.startswith(("checkpoint-", ".")) for part in path.relative_to(root).parts)
    )
    if not found:
        raise RecordError(
            f"expected safetensors weights in {root}, got none: save the model with save_pretrained first."
        )
    return found
