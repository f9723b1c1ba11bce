"""The run file: one YAML with a section for every stage, read and checked by its keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_immunize.errors import ConfigError
from hf_immunize.options import nearest, read_yaml

SECTIONS = {
    "output_dir": "folder of all results; the run file's own by default",
    "hardware": "option file of accelerate launch for the stages that train",
    "jobs": "stages that may run side by side",
    "task": "data: what the model keeps, what it shall not learn, and a benign task",
    "base": "folder or Hub id of a trained model; instead of pretrain",
    "base_revision": "branch, tag or commit of a base on the Hub",
    "public": "options of training a public model from scratch, which pretrain starts from",
    "pretrain": "options of the stage that trains the base, or its head",
    "judge": "options of the classifier that recognises what pipelines draw",
    "immunize": "one entry for each immunized model, by its name",
    "attack": "options of every attack on the harmful task",
    "benign": "options of learning the benign task",
    "scratch": "options of attacking random weights of the same architecture",
    "certify": "options of the judge",
    "report": "options of the page",
}
"""What a run file may hold, and what for."""

CONFIG = "config"
"""Key of a section that names option files it starts from."""

Options = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """The options of one section: those that its ``config`` files bring, and its own, which go before them."""

    inherited: Options
    own: Options

    @property
    def options(self) -> Options:
        """All of them."""
        return self.inherited | self.own


@dataclass(frozen=True)
class RunFile:
    """What one run file says.

    Args:
        path: the file.
        output_dir: folder of all results.
        hardware: option file of ``accelerate launch``.
        jobs: stages at a time.
        task: options of the data.
        base, base_revision: the trained model, where no stage makes it.
        sections: public, pretrain, judge, attack, benign, scratch, certify and report, those that are there.
        models: the immunized models by name; None for one that is there already.
    """

    path: Path
    output_dir: Path
    hardware: str | None
    jobs: int
    task: Options
    base: str | None
    base_revision: str | None
    sections: Mapping[str, Section]
    models: Mapping[str, Section | None]

    @classmethod
    def read(cls, path: str | Path) -> RunFile:
        """Read a run file.

        Raises:
            ConfigError: a file that cannot be read, a section that does not exist (the nearest is named), one of the
                wrong shape, or neither a base nor a stage that trains one.
        """
        file = Path(path)
        if file.is_dir():
            raise ConfigError(f"expected a run file, got the folder {file}: name the YAML in it, e.g. {file}/run.yaml.")
        loaded = read_yaml(file)
        if unknown := sorted(str(key) for key in loaded if key not in SECTIONS):
            raise ConfigError(
                f"expected sections among {list(SECTIONS)} in {file}, got unknown "
                f"{unknown}.{nearest(unknown, SECTIONS)}"
            )
        named = {name for name in ("output_dir", "hardware", "base", "base_revision") if loaded.get(name) is not None}
        for name in named:
            if not isinstance(loaded[name], str):
                raise ConfigError(f"expected text for {name} in {file}, got {loaded[name]!r}.")
        found = {
            name: _section(loaded.get(name) or {}, name, file)
            for name in ("task", "public", "pretrain", "judge", "attack", "benign", "scratch", "certify", "report")
            if name in loaded
        }
        task = found.pop("task", Section({}, {})).options
        if not task:
            raise ConfigError(f"expected a section task with the data in {file}, got none: see hf-immunize init "
                              "--help.")
        run = cls(
            file, Path(loaded.get("output_dir") or file.parent), loaded.get("hardware"), _jobs(loaded, file), task,
            loaded.get("base"), loaded.get("base_revision"), found, _models(loaded.get("immunize"), file),
        )  # fmt: skip
        run._check_base()
        return run

    def _check_base(self) -> None:
        """Raise ConfigError unless there is one way to the base."""
        if ("pretrain" in self.sections) == (self.base is not None):
            got = "both" if self.base is not None else "neither"
            raise ConfigError(
                f"expected base (a trained model) or pretrain (options to train it) in {self.path}, got {got}: remove "
                "one of them." if got == "both" else
                f"expected base (a trained model) or pretrain (options to train it) in {self.path}, got neither: add "
                "one of them."
            )
        if "public" in self.sections and "pretrain" not in self.sections:
            raise ConfigError(
                f"expected public only with pretrain in {self.path}, got it with base: nothing would start from it. "
                "Remove it."
            )
        if self.base_revision is not None and self.base is None:
            raise ConfigError(f"expected base_revision only with base in {self.path}, got it with pretrain: remove it.")


def _jobs(loaded: Mapping[str, Any], file: Path) -> int:
    jobs = loaded.get("jobs", 1)
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ConfigError(f"expected a whole number from 1 on for jobs in {file}, got {jobs!r}.")
    return jobs


def _models(loaded: Any, file: Path) -> dict[str, Section | None]:
    """The entries of ``immunize``."""
    if not isinstance(loaded, Mapping) or not loaded:
        raise ConfigError(
            f"expected in section immunize of {file} a name for each immunized model with its options below it, e.g. "
            f"'closed_form_adversary:', got {loaded!r}."
        )
    found: dict[str, Section | None] = {}
    for name, options in loaded.items():
        if not isinstance(name, str) or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise ConfigError(f"expected names of letters, digits, '-', '_' and '.' in immunize of {file}, got "
                              f"{name!r}.")
        if name in ("base", "public", "judge", "logs", "stages", "replaced", "report"):
            raise ConfigError(f"expected another name than {name!r} in immunize of {file}: a folder is called so "
                              "already.")
        if options is not None and not isinstance(options, Mapping):
            raise ConfigError(
                f"expected options of one model under immunize: {name}: in {file}, got {options!r}: put a name for the "
                "model between immunize and its options."
            )
        found[name] = None if options is None else _section(options, f"immunize.{name}", file)
    return found


def _section(loaded: Any, name: str, file: Path) -> Section:
    """One section with the option files that its ``config`` names."""
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"expected options with values in section {name} of {file}, got {loaded!r}.")
    if wrong := [key for key in loaded if not isinstance(key, str)]:
        raise ConfigError(f"expected names of options in section {name} of {file}, got {wrong[0]!r}.")
    own = dict(loaded)
    files = own.pop(CONFIG, None) or []
    inherited: Options = {}
    for entry in files if isinstance(files, list) else [files]:
        inherited |= read_yaml(_find(entry, name, file))
    return Section(inherited, own)


def _find(entry: Any, name: str, file: Path) -> Path:
    """An option file, from the working directory or beside the run file."""
    places = [Path(str(entry)), file.parent / str(entry)]
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(
        f"expected the option file {entry!r} that config of section {name} in {file} names, got none in the working "
        f"directory and none in {file.parent}: check the path."
    )
