"""The files of one folder, read safely: nothing outside it, nothing through a foreign link, each hashed once."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from io import BufferedReader, FileIO
from pathlib import Path

from hf_immunize.errors import RecordError
from hf_immunize.hub.findings import Findings
from hf_immunize.hub.names import SEAL, kind_of, looks_pickled, problem_with, twins
from hf_immunize.hub.untrusted import AnyRecord, parse_record
from hf_immunize.records import Record

_BLOCK = 1 << 20
_MOST_FILES = 100_000
LARGEST_TEXT = 16 << 20
"""No record, card or list of hashes is read beyond this many bytes: parsed JSON can take twenty times its size."""
LARGEST_FILE = 64 << 20
"""No other file than weights is published beyond this many bytes."""


@dataclass
class Inventory:
    """Regular files below a folder by their relative name."""

    root: Path
    files: dict[str, Path]
    digests: dict[str, str] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict, repr=False)
    """Records by file, kept for whoever asks again: what is judged is then what was hashed."""

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def only(self, names: Iterable[str]) -> Inventory:
        """The same folder, as if it held nothing but ``names``."""
        kept = set(names)
        return Inventory(self.root, {name: path for name, path in self.files.items() if name in kept}, self.digests)

    def digest(self, name: str) -> str:
        """SHA-256 of a file, read once in blocks of 1 MiB."""
        if name not in self.digests:
            digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
            with self._open(name) as stream:
                while count := stream.readinto(block):
                    digest.update(block[:count])
            self.digests[name] = digest.hexdigest()
        return self.digests[name]

    def read(self, name: str, limit: int = LARGEST_TEXT) -> bytes:
        """A small file as bytes; what is returned is also what ``digest`` answers for.

        Raises:
            RecordError: the file is not there, cannot be read, or is too large to be what it claims.
        """
        with self._open(name) as stream:
            data = stream.read(limit + 1)
        if len(data) > limit:
            raise RecordError(f"expected {name} below {limit >> 20} MiB, got more: this is not what it claims to be.")
        self.digests[name] = hashlib.sha256(data).hexdigest()
        return data

    def record(self, kind: type[AnyRecord], name: str) -> AnyRecord:
        """The record in a small file; ``keep`` decides whether a second call reads it again.

        Raises:
            RecordError: as ``read`` and ``parse_record``.
        """
        found = self.records.get(name)
        return found if isinstance(found, kind) else parse_record(kind, self.read(name))

    def keep(self, name: str, record: Record) -> None:
        """Let ``record`` answer for a file from now on."""
        self.records[name] = record

    def head(self, name: str) -> bytes:
        """The first bytes of a file."""
        with self._open(name) as stream:
            return stream.read(8)

    def tensor_names(self, name: str) -> list[str]:
        """Names of the tensors in a safetensors file, from its header alone.

        Raises:
            RecordError: it has no such header.
        """
        with self._open(name) as stream:
            size = int.from_bytes(stream.read(8), "little")
            head = stream.read(size) if size <= LARGEST_TEXT else b""
        try:
            return [key for key in json.loads(head) if key != "__metadata__"]
        except ValueError as error:
            raise RecordError(f"expected a safetensors header in {name}, got something else: restore it.") from error

    def _open(self, name: str) -> BufferedReader | FileIO:
        if name not in self.files:
            raise RecordError(f"expected {name} in {self.root.name}, got no such file: download or restore it.")
        try:
            handle = os.open(self.files[name], os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                os.close(handle)
                raise OSError("it is not a regular file")
            return os.fdopen(handle, "rb", buffering=0) if name.endswith(".safetensors") else os.fdopen(handle, "rb")
        except OSError as error:
            raise RecordError(f"expected to read {name}, got {error.strerror or error}: restore the file.") from error


def scan(folder: str | Path, findings: Findings) -> Inventory:
    """List a folder; links, special files, unsafe and confusable names become findings and are left out.

    The links of the Hub client's own cache, which lead to its ``blobs``, are followed; no other link is.

    Raises:
        RecordError: there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise RecordError(f"expected a folder with a published model, got {str(folder)!r}: check the path.")
    sealed = (root / SEAL).is_file()
    inventory = Inventory(root, {})
    _walk(root, "", _blobs_of(root), sealed, inventory, findings)
    for first, second in twins(inventory.files):
        for name, other in ((first, second), (second, first)):
            findings.fail("name", name, f"its name differs from {other!r} only in case or form: rename one of them.")
    return inventory


def _blobs_of(root: Path) -> Path | None:
    """The ``blobs`` folder of the Hub client's cache when ``root`` is one of its snapshots."""
    resolved = root.resolve()
    blobs = resolved.parent.parent / "blobs"
    return blobs if resolved.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink() else None


def _walk(
    folder: Path, prefix: str, blobs: Path | None, sealed: bool, inventory: Inventory, findings: Findings
) -> None:
    for entry in sorted(os.scandir(folder), key=lambda found: found.name):
        name = prefix + entry.name
        if _is_housekeeping(entry.name, prefix, sealed):
            continue
        if (problem := problem_with(name)) is not None:
            findings.fail("name", name, f"unsafe file name: {problem}. Rename it or delete it.")
        elif entry.is_symlink():
            target = Path(os.path.realpath(entry.path))
            if blobs is not None and target.parent == blobs and target.is_file():
                inventory.files[name] = target
            else:
                findings.fail("link", name, "expected a file, got a symbolic link: replace it by the file itself.")
        elif entry.is_dir(follow_symlinks=False):
            _walk(Path(entry.path), f"{name}/", blobs, sealed, inventory, findings)
        elif entry.is_file(follow_symlinks=False):
            inventory.files[name] = Path(entry.path)
        else:
            findings.fail("special", name, "expected a regular file, got a pipe, socket or device: delete it.")
        if len(inventory.files) > _MOST_FILES:
            raise RecordError(f"expected at most {_MOST_FILES} files in {folder.name}, got more: this is no model.")


def _is_housekeeping(entry: str, prefix: str, sealed: bool) -> bool:
    """Git's and the client's own folders; checkpoints of a run that was not published."""
    if not prefix and entry in (".git", ".cache"):
        return True
    return not sealed and entry.startswith("checkpoint-")


def find_pickles(inventory: Inventory, findings: Findings) -> None:
    """Refuse every file that is a pickle by name or by its first bytes. Nothing is ever unpickled."""
    for name in inventory.files:
        by_name = kind_of(name) == "pickle"
        if by_name or (kind_of(name) not in ("weights", "page") and looks_pickled(inventory.head(name))):
            how = "by its name" if by_name else "by its first bytes"
            findings.fail("pickle", name, f"a pickle or archive ({how}), which can run code when read: delete it.")
