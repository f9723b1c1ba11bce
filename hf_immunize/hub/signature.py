"""Detached Ed25519 signatures over the bytes of a certificate, and over the list of what was published with it.

Keyless signatures (sigstore, 4.5 when it was looked at) are not offered: its client asks an identity provider, a
certificate authority, a clock and a log over the network for every signature, so that no test without a network could
show that signing works; what it verifies offline is bundles that somebody else made.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from pydantic import Field

from hf_immunize.errors import ConfigError
from hf_immunize.records import Record

_KEY = re.compile(r"[0-9a-f]{64}")
KEY_VARIABLE = "HF_IMMUNIZE_SIGNING_KEY"


class SignatureRecord(Record):
    """``certificate.sig``: who signed which certificate."""

    algorithm: str = Field(pattern=r"^ed25519$")
    public_key: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Raw public key, hexadecimal."""
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")
    """Over the bytes of ``certificate.json`` as they are, hexadecimal."""
    certificate_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    seal_signature: str = Field(pattern=r"^[0-9a-f]{128}$")
    """Over ``SHA256SUMS`` without the line of ``certificate.sig``, hexadecimal: page, pictures and records too."""


def make_key(path: str | Path) -> str:
    """Write a new private key (PEM, readable by its owner only); the public key as hexadecimal.

    Raises:
        ConfigError: there is a file already, or it cannot be written.
    """
    primitives = _primitives()
    private, serialization = primitives.ed25519.Ed25519PrivateKey.generate(), primitives.serialization
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(
            f"expected to write a new key to {path}, got {error.strerror}: no key is overwritten, choose another path."
        ) from error
    with os.fdopen(handle, "wb") as stream:
        stream.write(pem)
    return _hexadecimal(private.public_key())


def sign(certificate: bytes, sealed: bytes, key_file: str | Path) -> bytes:
    """The text of ``certificate.sig`` for a certificate and for the seal, its own line left out.

    Raises:
        ConfigError: no Ed25519 private key in PEM form in ``key_file``.
    """
    private = _private(key_file)
    return SignatureRecord(
        algorithm="ed25519",
        public_key=_hexadecimal(private.public_key()),
        signature=private.sign(certificate).hex(),
        certificate_sha256=hashlib.sha256(certificate).hexdigest(),
        seal_signature=private.sign(sealed).hex(),
    ).dumps().encode()


def is_valid(record: SignatureRecord, certificate: bytes, sealed: bytes | None = None) -> bool:
    """Whether the signatures in the record are ones by its key over these bytes; the seal is left out when None."""
    primitives = _primitives()
    public = primitives.ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(record.public_key))
    try:
        public.verify(bytes.fromhex(record.signature), certificate)
        if sealed is not None:
            public.verify(bytes.fromhex(record.seal_signature), sealed)
    except primitives.InvalidSignature:
        return False
    return True


def sign_text(text: bytes, key_file: str | Path) -> tuple[str, str]:
    """Public key and signature over any bytes, hexadecimal.

    Raises:
        ConfigError: as ``sign``.
    """
    private = _private(key_file)
    return _hexadecimal(private.public_key()), private.sign(text).hex()


def signed_text(public_key: str, signature: str, text: bytes) -> bool:
    """Whether a signature is one by this key over these bytes."""
    primitives = _primitives()
    try:
        primitives.ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(
            bytes.fromhex(signature), text)
    except primitives.InvalidSignature:
        return False
    return True


def public_key_of(key_file: str | Path) -> str:
    """The public half of a private key, hexadecimal. Raises ConfigError as ``sign``."""
    return _hexadecimal(_private(key_file).public_key())


def default_key_file() -> Path:
    """Where ``keygen`` puts a key and ``publish`` looks for one: HF_IMMUNIZE_SIGNING_KEY, or a file of the user's
    configuration folder."""
    named = os.environ.get(KEY_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "hf_immunize" / "signing.pem"


def find_key() -> Path | None:
    """The default key where there is one.

    Raises:
        ConfigError: HF_IMMUNIZE_SIGNING_KEY names a file that is not there.
    """
    path = default_key_file()
    if path.is_file():
        return path
    if os.environ.get(KEY_VARIABLE):
        raise ConfigError(
            f"expected a private key in {path}, which {KEY_VARIABLE} names, got no file: make one with "
            "'hf-immunize keygen', or unset the variable."
        )
    return None


def trusted(key: str | Path) -> str:
    """A public key as hexadecimal, given as such or as a file that holds it in hexadecimal or PEM form.

    Raises:
        ConfigError: neither.
    """
    text = str(key).strip()
    if _KEY.fullmatch(text.lower()):
        return text.lower()
    try:
        data = Path(text).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"expected a trusted key as 64 hexadecimal digits or a file, got {text[:80]!r}: ask the publisher for it."
        ) from error
    if _KEY.fullmatch(data.decode("ascii", "replace").strip().lower()):
        return data.decode("ascii").strip().lower()
    primitives = _primitives()
    try:
        public = primitives.serialization.load_pem_public_key(data)
    except ValueError as error:
        raise ConfigError(
            f"expected a public key in {text}, got something else: give the public half, in PEM or hexadecimal form."
        ) from error
    return _hexadecimal(public)


def _private(key_file: str | Path) -> Any:
    """An Ed25519 private key from a file."""
    primitives = _primitives()
    try:
        private = primitives.serialization.load_pem_private_key(Path(key_file).read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"expected an unencrypted Ed25519 private key (PEM) in {key_file}, got none: make one with "
            "'hf-immunize keygen'."
        ) from error
    if not isinstance(private, primitives.ed25519.Ed25519PrivateKey):
        raise ConfigError(f"expected an Ed25519 key in {key_file}, got {type(private).__name__}: make one with keygen.")
    return private


def _hexadecimal(public: Any) -> str:
    return bytes(public.public_bytes_raw()).hex()


def _primitives() -> Any:
    """The parts of ``cryptography`` that are used here; loaded when a signature is."""
    try:
        from cryptography import exceptions
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise ConfigError(
            "expected the package 'cryptography', which signatures need, got none: pip install cryptography."
        ) from error
    return _Parts(exceptions.InvalidSignature, serialization, ed25519)


class _Parts:
    def __init__(self, invalid: type[Exception], serialization: Any, ed25519: Any) -> None:
        self.InvalidSignature, self.serialization, self.ed25519 = invalid, serialization, ed25519
