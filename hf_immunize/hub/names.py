"""File names from strangers: which are safe to open, and what a file of a published model is."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Literal

from hf_immunize.records.files import LOADING_FILES

Kind = Literal["weights", "loading", "record", "trace", "recheck", "page", "code", "pickle", "other"]

CERTIFICATE = "certificate.json"
SIGNATURE = "certificate.sig"
SEAL = "SHA256SUMS"
CARD = "README.md"
REPORT = "report.html"
IMMUNIZATION = "immunization.json"
UTILITY_FOLDER = "utility"
"""Folder of the answers that the utility is computed from."""
RECHECKS = "rechecks"
"""Folder of signed records of those who ran certified attacks again; they may come after the seal."""
RECORDS = (CERTIFICATE, SIGNATURE, SEAL, IMMUNIZATION)
UNSEALED = (SEAL, CARD, ".gitattributes")
"""What ``SHA256SUMS`` does not list: itself, the card, whose tables are checked against the certificate, and git's."""

_PICKLES = (
    ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".t7", ".mar", ".ptl",
    ".h5", ".keras", ".dump", ".sav",
)
_PAGES = (".html", ".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp", ".md", ".bib", ".cff")
_HARMLESS = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".md", ".bib", ".cff", ".txt", ".pdf")
_LICENCES = ("LICENSE", "LICENSE.txt", "LICENCE", "NOTICE", "NOTICE.txt")
_DRIVE = re.compile(r"^[A-Za-z]:")
_RESERVED = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.I)
_LONGEST_PART, _LONGEST = 255, 1024


@lru_cache(maxsize=4096)  # every check asks of every file
def problem_with(name: str) -> str | None:
    """Why ``name`` must not be opened below a model's folder; None for a safe relative path."""
    if not name or "\x00" in name:
        return "it is empty or holds a null character"
    if name.startswith(("/", "~")) or _DRIVE.match(name):
        return "it is absolute"
    if "\\" in name:
        return "it holds a backslash"
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "it holds an empty part, '.' or '..'"
    if any(unicodedata.category(letter) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"} for letter in name):
        return "it holds invisible, control or unassigned characters"
    if unicodedata.normalize("NFKC", name) != name:
        return "it is not in normal form, so that it looks like another name"
    if any(len(part.encode()) > _LONGEST_PART for part in parts) or len(name.encode()) > _LONGEST:
        return f"it is longer than {_LONGEST_PART} bytes a part or {_LONGEST} in all"
    if any(part.endswith((" ", ".")) or part.startswith(" ") or _RESERVED.match(part) for part in parts):
        return "it is a name that some systems read as another"
    return None


def twins(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names, of files or of the folders above them, that a file system without case would take for one."""
    seen: dict[str, str] = {}
    found = []
    for name in dict.fromkeys(path for whole in names for path in (*_folders(whole), whole)):
        folded = unicodedata.normalize("NFKC", name).casefold()
        if folded in seen and seen[folded] != name:
            found.append((seen[folded], name))
        seen.setdefault(folded, name)
    return found


def _folders(name: str) -> list[str]:
    return [parent.as_posix() for parent in reversed(PurePosixPath(name).parents[:-1])]


@lru_cache(maxsize=4096)
def kind_of(name: str) -> Kind:
    """What a file is, by its name alone."""
    path = PurePosixPath(name)
    suffix, last = path.suffix.lower(), path.name
    if name in RECORDS:
        return "record"
    if path.parts[0] in ("traces", UTILITY_FOLDER) and suffix == ".json":
        return "trace"
    if path.parts[0] == RECHECKS and suffix == ".json":
        return "recheck"
    if last.lower().endswith(".safetensors"):
        return "weights"
    if any(part in _PICKLES for part in (inner.lower() for inner in path.suffixes[-3:])):
        return "pickle"
    if any(fnmatchcase(last, pattern) for pattern in LOADING_FILES):
        return "loading"
    if suffix in (".py", ".pyc", ".so", ".dll", ".ipynb", ".sh"):
        return "code"
    if suffix in _PAGES or last in _LICENCES:
        return "page"
    return "other"


def looks_pickled(head: bytes) -> bool:
    """Whether a file's first bytes are those of a pickle, or of the archive that ``torch.save`` writes."""
    return head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 1 or head[:4] == b"PK\x03\x04"


def is_harmless(name: str) -> bool:
    """A picture or a text that loading never reads: it may lie in a repository without being sealed."""
    return name in UNSEALED or kind_of(name) == "page" and PurePosixPath(name).suffix.lower() in ("", *_HARMLESS)
