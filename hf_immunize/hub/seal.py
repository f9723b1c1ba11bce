"""``SHA256SUMS``: the digest of every published file, in the format that ``sha256sum --check`` reads.

A seal finds damage and partial swaps. It is not a signature: who can replace files can replace the seal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from hf_immunize.errors import RecordError
from hf_immunize.hub.names import CERTIFICATE, SEAL, UNSEALED, problem_with

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_seal(digests: Mapping[str, str]) -> bytes:
    """The seal over these files, sorted by name; what cannot be sealed is left out."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()) if name not in UNSEALED).encode()


def read_seal(data: bytes) -> dict[str, str]:
    """Digest by name.

    Raises:
        RecordError: a line in another form, an unsafe or repeated name, or no certificate in the list.
    """
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise RecordError(f"expected {SEAL} as UTF-8 text, got other bytes: publish again.") from error
    if lines.pop() != "":
        raise RecordError(f"expected {SEAL} to end with a line break, got a cut file: publish again.")
    sealed: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None or problem_with(match[2]) or match[2] in sealed:
            raise RecordError(
                f"expected 'SHA-256, two spaces, file name' in line {number} of {SEAL}, each safe name once, got "
                f"{line[:120]!r}: publish again."
            )
        sealed[match[2]] = match[1]
    if CERTIFICATE not in sealed:
        raise RecordError(f"expected {CERTIFICATE} in {SEAL}, got a list without it: publish again.")
    return sealed
