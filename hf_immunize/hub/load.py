"""Use a model only after it was verified: download without pickles, verify the files, load from exactly those."""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_immunize.errors import ConfigError, ModelError, VerificationError
from hf_immunize.hub.demands import elsewhere_in, is_configuration
from hf_immunize.hub.findings import Findings, Verification
from hf_immunize.hub.inventory import find_pickles, scan
from hf_immunize.hub.library import ADAPTER_FILE, library_of
from hf_immunize.hub.names import kind_of, problem_with
from hf_immunize.hub.policy import Policy
from hf_immunize.hub.verify import verify_folder
from hf_immunize.records import Certificate

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_PATTERNS = (
    "*.safetensors", "*.json", "*.txt", "*.md", "*.html", "*.png", "*.svg", "*.jpg", "*.jpeg", "*.gif", "*.webp",
    "*.bib", "*.cff", "*.sig", "SHA256SUMS", "LICEN[CS]E*", "NOTICE*",
)
_PASSED_ON = ("dtype", "torch_dtype", "device_map", "max_memory", "attn_implementation")


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    api: HfApi | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    with_code: bool = False,
    timeout: float | None = 120.0,
) -> Path:
    """Download one revision into the client's cache, pickles never; the folder of the snapshot.

    Raises:
        VerificationError: the repository holds a pickle or a file with an unsafe name; nothing is downloaded.
        HubError: the Hub did not answer, or not with this repository.
    """
    from huggingface_hub import HfApi, get_token  # its client takes longer to load than a folder to verify

    from hf_immunize.hub.remote import asked, careful

    api = api or HfApi(token=token)
    secret = token or (api.token if isinstance(api.token, str) else get_token())
    patterns = [*_PATTERNS, *(["*.py"] if with_code else [])]
    with careful(timeout, secret):
        if not local_files_only:
            info = asked("describe the repository", secret,
                         lambda: api.model_info(repo_id, revision=revision, token=token))
            _refuse_names([item.rfilename for item in info.siblings or []], repo_id)
            revision = info.sha
        folder = asked("send the files", secret, lambda: api.snapshot_download(
            repo_id, revision=revision, cache_dir=cache_dir, token=token, allow_patterns=patterns,
            local_files_only=local_files_only,
        ))
    return Path(str(folder))


def _refuse_names(names: list[str], repo_id: str) -> None:
    bad = [f"  {name!r}: {problem}" for name in names if (problem := problem_with(name)) is not None]
    bad += [f"  {name!r}: a pickle, which can run code when read" for name in names if kind_of(name) == "pickle"]
    if bad:
        raise VerificationError(
            f"expected only safetensors, records and texts with safe names in {repo_id}, got files that may not be "
            "downloaded; ask the publisher to delete them:\n" + "\n".join(bad[:20])
        )


def verify_model(
    target: str | Path,
    *,
    policy: Policy | None = None,
    revision: str | None = None,
    trusted_key: str | Path | None = None,
    checker_keys: Collection[str | Path] = (),
    today: datetime.date | None = None,
    rejudge: bool = False,
    **fetching: Any,
) -> tuple[Path, Verification]:
    """Verify a local folder or a Hub repository; the folder with its files, and the outcome."""
    folder = Path(target)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(target)):
            raise ConfigError(f"expected a folder or 'owner/name' on the Hub, got {str(target)!r}: check the path.")
        folder = fetch(str(target), revision=revision, **fetching)
    elif revision is not None:
        raise ConfigError(f"expected a revision only with a Hub repository, got one with {folder}: leave it.")
    return folder, verify_folder(
        folder, policy=policy, trusted_key=trusted_key, checker_keys=checker_keys, today=today, rejudge=rejudge
    )


def load_verified(
    repo_id_or_path: str | Path,
    *,
    policy: Policy | None = None,
    revision: str | None = None,
    trusted_key: str | Path | None = None,
    checker_keys: Collection[str | Path] = (),
    base: str | Path | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    api: HfApi | None = None,
    today: datetime.date | None = None,
    **model_options: Any,
) -> Any:
    """A model, or a VerificationError.

    Args:
        repo_id_or_path: local folder, or ``owner/name`` on the Hub.
        policy: what the certificate has to say; without one, only that the files are what it says.
        revision: branch, tag or commit; the commit is resolved once, and that one is verified and loaded.
        trusted_key: publisher's key whose signature is required.
        checker_keys: keys of those whose signed rechecks count.
        base: for an adapter, the folder of its base; its weights must be those the certificate names as control.
        trust_remote_code: run code from the repository. No check covers what it does.
        model_options: ``dtype``, ``device_map``, ``max_memory`` or ``attn_implementation`` for ``from_pretrained``.

    Raises:
        VerificationError: files that are not what the certificate says, or an unmet policy; nothing was loaded.
        ConfigError: an option that could make loading read something else.
    """
    if unknown := sorted(set(model_options) - set(_PASSED_ON)):
        raise ConfigError(f"expected options out of {', '.join(_PASSED_ON)}, got {unknown}: load by hand for others.")
    folder, found = verify_model(
        repo_id_or_path, policy=policy, revision=revision, trusted_key=trusted_key, checker_keys=checker_keys,
        today=today, token=token, api=api,
        cache_dir=cache_dir, local_files_only=local_files_only, with_code=trust_remote_code,
    )
    certificate = found.require().certificate
    assert certificate is not None  # required above
    options = {"local_files_only": True, "use_safetensors": True, **model_options}
    return _load(folder, certificate, base, trust_remote_code, options)


def _load(
    folder: Path, certificate: Certificate, base: str | Path | None, trust_remote_code: bool, options: dict[str, Any]
) -> Any:
    """A verified folder by what it holds: an adapter, a pipeline, or a model."""
    library = library_of(certificate, {path.name for path in folder.iterdir()}).name
    if library == "peft":
        return _load_adapter(folder, certificate, base, options)
    if library == "diffusers":
        return _diffusers().DiffusionPipeline.from_pretrained(folder, **options)
    return _auto_class(certificate).from_pretrained(folder, trust_remote_code=trust_remote_code, **options)


def _auto_class(certificate: Certificate) -> Any:
    import transformers

    import hf_immunize.features.headed  # noqa: F401  (makes the Auto classes know models made by add_head)

    classifies = certificate.subject.architecture.endswith("ForImageClassification")
    return transformers.AutoModelForImageClassification if classifies else transformers.AutoModel


def _load_adapter(folder: Path, certificate: Certificate, base: str | Path | None, options: dict[str, Any]) -> Any:
    """The adapter on its base, whose weights are compared with the certificate's control first."""
    if base is None:
        raise ModelError(
            f"expected the folder of the base {certificate.control.name!r} for this adapter, got none: an adapter "
            "alone does not say which weights it changes. Download the base and pass base=."
        )
    root = Path(base)
    check_base(root, certificate)
    from peft import PeftModel

    model = _auto_class(certificate).from_pretrained(root, **options)
    return PeftModel.from_pretrained(model, folder, local_files_only=True)


def check_base(root: Path, certificate: Certificate) -> None:
    """The base an adapter is put on: the certified weights, and nothing that loads anything else in their place."""
    findings = Findings()
    held = scan(root, findings)
    find_pickles(held, findings)
    for name in held.files:
        if name.rpartition("/")[2] == ADAPTER_FILE:
            findings.fail("file-extra", name, "an adapter of its own, which would be loaded with the base: delete it.")
        elif is_configuration(name):
            for what in elsewhere_in(held.read(name)):
                findings.fail("elsewhere", name, f"it makes the loader go elsewhere: {what}.")
    if findings.found:
        told = "\n".join(f"  {item}" for item in findings.found)
        raise VerificationError(f"expected a plain base in {root.name}, got files that may not be loaded:\n{told}")
    weights = {name: held.digest(name) for name in held.files if kind_of(name) == "weights"}
    if weights != certificate.control.weights:
        raise VerificationError(
            f"expected in {root.name} the base weights that the certificate names ({certificate.control.name!r}), got "
            "others: an adapter on another base is another model."
        )


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ModelError("expected diffusers for a pipeline, got none: pip install hf_immunize[diffusers].") from error
    return diffusers
