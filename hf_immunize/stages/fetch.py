"""Copy a trained model into a folder of its own, for its traces and certificate; the original is not changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_immunize.options import option, parse_options, required
from hf_immunize.records import begin_run, finish_run, sha256_file

_RECORDS = ("run.json", "immunization.json", "certificate.json")
_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
_SMALL = 1 << 20


@dataclass
class FetchOptions:
    """Which model, and where to."""

    source: str = required("Folder (save_pretrained) or Hub id of the model.")
    output_dir: str = required("Folder it is brought to.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")
    trust_remote_code: bool = option(False, "Bring model code that comes with the model, too.")


def fetch_model(options: FetchOptions) -> Path:
    """Copy what loading reads: weights in safetensors, configurations, vocabularies.

    Raises:
        ModelError: a file, an adapter or pickles in the place of a model.
        ConfigError: neither a folder nor a possible Hub id.
        HubError: the Hub did not answer, or not with this repository.
        RunMismatchError: the folder holds another model.
    """
    from hf_immunize.hub import local_folder
    from hf_immunize.models import refuse_folder
    from hf_immunize.records import HUB_SOURCE

    refuse_folder(options.source)
    folder, source = local_folder(options.source, revision=options.revision, with_code=options.trust_remote_code)
    target = Path(options.output_dir)
    if target.exists() and target.resolve() == Path(folder).resolve():
        print(f"{target}: is the model itself, nothing to do")
        return target
    names = sorted(path.relative_to(folder).as_posix() for path in _wanted(folder, options.trust_remote_code))
    inputs = {"files": {name: sha256_file(folder / name) for name in names}}
    if begin_run(target, "fetch", inputs):
        print(f"{target}: already there, nothing to do")
        return target
    for name in names:
        _bring(folder / name, target / name, link=source is not None)
    if source is not None:
        source.write(target / HUB_SOURCE)
    finish_run(target, "fetch", inputs, names)
    print(f"{target}: {len(names)} files of {options.source}")
    return target


def _wanted(folder: Path, code: bool) -> Iterator[Path]:
    """Files of a model: of its own folder, and of those of a pipeline's parts."""
    for path in folder.rglob("*"):
        inside = path.relative_to(folder).parts
        hidden = any(part.startswith((".", "checkpoint-")) or part in ("traces", "samples") for part in inside[:-1])
        suffixes = (*_SUFFIXES, ".py") if code else _SUFFIXES
        if path.is_file() and path.suffix in suffixes and not hidden and path.name not in _RECORDS and len(inside) < 3:
            yield path


def _bring(source: Path, target: Path, link: bool) -> None:
    """A copy; with ``link``, of a large file a second name instead, where both lie on one disk.

    Nobody writes into a file of the Hub's cache. Into one's own one may: ``cp`` onto it changes all of its names.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    real, part = source.resolve(), target.with_name(f"{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        if not link or real.stat().st_size <= _SMALL:
            raise OSError
        os.link(real, part)
    except OSError:
        shutil.copyfile(real, part)
    os.replace(part, target)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """The stage on words of a command line."""
    (options,) = parse_options((FetchOptions,), argv, __doc__, prog)
    fetch_model(options)
