"""A model's folder on this machine: the folder itself, or the files of one revision on the Hub."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, get_token

from hf_immunize.errors import ConfigError, HubError, ModelError, RecordError, RunMismatchError
from hf_immunize.hub.names import problem_with
from hf_immunize.hub.remote import asked, careful
from hf_immunize.records import HUB_SOURCE, HubSource

_VARIANT = re.compile(r"\.[A-Za-z0-9_]+(-\d+-of-\d+)?\.safetensors$|\.safetensors\.index\.[A-Za-z0-9_]+\.json$")
_WANTED = ("*.safetensors", "*.json", "*.txt", "*spiece.model")


def is_hub_id(text: str) -> bool:
    """Whether ``text`` could be a repository on the Hub: ``owner/name``, or ``name`` alone."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text) is not None


def working_folder(source: str | Path) -> Path | None:
    """Where recipes copy a model from the Hub to, ``runs/<owner>--<name>``; None for a local folder."""
    return None if Path(source).is_dir() else Path("runs", str(source).replace("/", "--"))


def local_folder(
    source: str | Path,
    *,
    revision: str | None = None,
    into: str | Path | None = None,
    with_code: bool = False,
    api: HfApi | None = None,
    timeout: float | None = 120.0,
) -> tuple[Path, HubSource | None]:
    """The folder of a model named by path or by Hub id, and where on the Hub it came from.

    A local folder is returned as it is. Of a repository only safetensors, JSON and text files and SentencePiece
    vocabularies are downloaded; pickles are left where they are.

    Args:
        revision: branch, tag or commit of a Hub repository.
        into: working folder that gets a copy of the files, so that traces and certificate can lie beside exactly the
            weights they speak of; a copy that is there already is used without asking the Hub again. By default the
            client's cache.
        with_code: also download Python files, for a model whose code the user trusts.

    Raises:
        ConfigError: neither a folder nor a possible Hub id, or a revision of a local folder.
        ModelError: the repository holds no safetensors file, or a file with an unsafe name; or a single file.
        RunMismatchError: ``into`` holds something else.
        HubError: the Hub did not answer, or not with this repository.
    """
    folder = Path(source)
    if str(source) and folder.is_dir():
        if revision is not None:
            raise ConfigError(f"expected a revision only with a Hub repository, got one with {folder}: leave it.")
        return folder, HubSource.find(folder)
    name = str(source)
    from hf_immunize.models import refuse_folder  # torch is needed from here on anyway

    refuse_folder(source)  # a single file looks like a Hub id
    if not is_hub_id(name):
        raise ConfigError(f"expected a folder or 'owner/name' on the Hub, got {name!r}: check the path.")
    if into is not None and (kept := _kept(Path(into), name, revision)) is not None:
        return Path(into), kept
    try:
        snapshot, found = _download(name, revision, with_code, api or HfApi(), timeout)
    except HubError as error:
        raise HubError(f"{error} A local folder {name!r} is not there either.") from None
    if into is None:
        return snapshot, found
    _copy(snapshot, Path(into), found)
    return Path(into), found


def _kept(into: Path, repo_id: str, revision: str | None) -> HubSource | None:
    """The source of the copy that ``into`` holds; None when it holds nothing yet."""
    kept = HubSource.find(into)
    if kept is None:
        if into.exists() and any(into.iterdir()):
            raise RunMismatchError(f"expected a new folder for {repo_id}, got files in {into}: choose another one.")
        return None
    if kept.repo_id != repo_id or (revision is not None and revision not in (kept.revision, kept.asked)):
        raise RunMismatchError(
            f"expected {repo_id} at {revision or 'any revision'} in {into}, got {kept.repo_id} at {kept.revision}: "
            "choose another output folder."
        )
    return kept


def _download(
    repo_id: str, revision: str | None, with_code: bool, api: HfApi, timeout: float | None
) -> tuple[Path, HubSource]:
    """One revision in the client's cache, pickles left where they are."""
    secret = api.token if isinstance(api.token, str) else get_token()
    patterns = [*_WANTED, *(["*.py"] if with_code else [])]
    with careful(timeout, secret):
        info = asked("describe the repository", secret, lambda: api.model_info(repo_id, revision=revision))
        names = [item.rfilename for item in info.siblings or []]
        wanted = [name for name in _parts_of_a_pipeline(names) if _fits(name, patterns)]
        bad = [f"{name!r}: {problem}" for name in wanted if (problem := problem_with(name)) is not None]
        if bad or not any(name.endswith(".safetensors") for name in wanted):
            raise ModelError(
                f"expected safetensors weights with safe file names in {repo_id}, got "
                f"{'; '.join(bad[:5]) or 'no safetensors file'}: convert the model with save_pretrained and load that."
            )
        folder = asked("send the files", secret, lambda: api.snapshot_download(
            repo_id, revision=info.sha, allow_patterns=[_literal(name) for name in wanted]))
    return Path(str(folder)), HubSource(repo_id=repo_id, revision=str(info.sha), asked=revision)


def _parts_of_a_pipeline(names: Sequence[str]) -> list[str]:
    """Of a diffusers pipeline the files that loading reads: no single-file checkpoints beside the folders of its parts,
    and no second precision of weights (``model.fp16.safetensors``) where there is the plain one."""
    if "model_index.json" not in names:
        return list(names)
    parts = [name for name in names if "/" in name or not name.endswith(".safetensors")]
    plain = [name for name in parts if not _VARIANT.search(name)]
    return plain if any(name.endswith(".safetensors") for name in plain) else parts


def _literal(name: str) -> str:
    """A pattern that fits this name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file name fits one of the patterns, as the Hub's client matches them."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def _copy(snapshot: Path, into: Path, found: HubSource) -> None:
    """Copy a snapshot (links into the cache) as files; an interrupted copy leaves no folder that looks whole.

    Raises:
        RecordError: the files cannot be written.
    """
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=f".{into.name[:40]}.", suffix=".part") as part:
        copied = Path(part, "model")
        try:
            shutil.copytree(snapshot, copied)
            found.write(copied / HUB_SOURCE)
            os.replace(copied, into)
        except (OSError, shutil.Error) as error:
            raise RecordError(
                f"expected to copy {found.repo_id} to {into}, got {error}: free disk space or choose another folder."
            ) from error
