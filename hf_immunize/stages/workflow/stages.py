"""The stages that a run file asks for, in order: which verb with which options, on what, and after what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_immunize.errors import ConfigError
from hf_immunize.options import nearest
from hf_immunize.stages.workflow.run_file import RunFile, Section

BASE, PUBLIC = "base", "public"
_PLACES = {
    "pretrain": ("output_dir",), "immunize": ("output_dir", "base_path", "base_revision"),
    "attack": ("model_path", "role", "revision", "output_path", "control_path"),
    "certify": ("model_path", "base_path", "revision", "base_revision"), "report": ("model_paths", "base_path"),
}  # fmt: skip
"""Options that say where models lie: the run sets them."""
_VERBS = {"public": "pretrain", "judge": "pretrain", "benign": "attack", "scratch": "attack"}
"""Sections whose verb is called otherwise."""
_SHARED = ("pretrain", "immunize", "attack")


@dataclass(frozen=True)
class Stage:
    """One verb on one model.

    Args:
        name: of the stage, and of its log.
        verb: of ``hf-immunize``.
        options: everything the verb is told.
        needs: stages whose results it reads.
        folder: the model's folder; for the report, that of the page.
        kind: the section of the run file it comes from.
        after: stages that have to be done before, though a repetition of theirs leaves its results as they are: the
            exam of the base, whose effort that of a model follows.
    """

    name: str
    verb: str
    options: Mapping[str, Any]
    needs: tuple[str, ...]
    folder: Path
    kind: str
    after: tuple[str, ...] = ()

    @property
    def is_shared(self) -> bool:
        """Whether several processes can share it: by batches where one model is trained, by runs in an exam."""
        return self.verb in _SHARED

    @property
    def makes_model(self) -> bool:
        """Whether its result is a whole folder with a model."""
        return self.kind in ("fetch", "public", "pretrain", "judge", "immunize")

    def results(self) -> list[Path]:
        """The files of ours that are there, or would be its results."""
        if self.kind == "report":
            return [Path(self.options["output"])]
        if self.kind == "certify":
            return [self.folder / "certificate.json", self.folder / "README.md"]
        if self.makes_model:
            return [self.folder / "run.json"]
        roles = [self.options["role"], *(["nothing"] if self.kind == "attack" and self._of_base else [])]
        traces = [path for role in roles for path in sorted((self.folder / "traces" / role).glob("*.json"))]
        return [path for path in traces if path.name.startswith("benign_") == (self.kind == "benign")]

    @property
    def _of_base(self) -> bool:
        """Whether the stage attacks the base: what is reached without any model is found out with it."""
        return bool(self.options.get("role") == "control")


def make_stages(run: RunFile) -> dict[str, Stage]:
    """The stages of a run by name, each after those that it needs.

    Raises:
        ConfigError: a section that sets where models lie, which the run does.
    """
    return {stage.name: stage for stage in _stages(run)}


def _stages(run: RunFile) -> Iterator[Stage]:
    out, base = run.output_dir, base_folder(run)
    for name, asked in run.sections.items():
        _refuse_places(run, name, _VERBS.get(name, name), asked)
    ready: tuple[str, ...] = (BASE,)
    if "pretrain" in run.sections:
        start: dict[str, Any] = {}
        if "public" in run.sections:
            start = {"model_name_or_path": str(out / PUBLIC)}
            told = run.task | run.sections["public"].options | {"output_dir": str(out / PUBLIC)}
            yield Stage(PUBLIC, "pretrain", told, (), out / PUBLIC, "public")
        told = run.task | run.sections["pretrain"].options | start | {"output_dir": str(base)}
        yield Stage(BASE, "pretrain", told, (PUBLIC,) if start else (), base, "pretrain")
    elif base == out / BASE and Path(run.base or "").resolve() != base.resolve():
        told = {"source": run.base, "output_dir": str(base)}
        told |= {"revision": run.base_revision} if run.base_revision else {}
        trusted = any(one is not None and one.options.get("trust_remote_code") for one in run.models.values())
        yield Stage(BASE, "fetch", told | ({"trust_remote_code": True} if trusted else {}), (), base, "fetch")
    else:
        ready = ()
    judge: dict[str, Any] = {}
    if "judge" in run.sections:
        judge = {"judge_path": str(out / "judge")}
        told = run.sections["judge"].options | {"output_dir": str(out / "judge")}
        yield Stage("judge", "pretrain", told, (), out / "judge", "judge")
    for name, section in run.models.items():
        if section is not None:
            _refuse_places(run, f"immunize.{name}", "immunize", section)
            told = run.task | section.options | {"base_path": str(base), "output_dir": str(out / name)}
            yield Stage(name, "immunize", told, ready, out / name, "immunize")
    of_base = list(_attacks(run, BASE, base, ready))
    yield from of_base
    certified = []
    for name, section in run.models.items():
        made = () if section is None else (name,)
        attacks = list(_attacks(run, name, out / name, made, base))
        yield from attacks
        same = {key: value for key, value in _options(run, "attack").items() if key == "protocol"}
        judging = run.sections.get("certify", Section({}, {}))
        told = run.task | same | judging.inherited | judge | judging.own
        told |= {"model_path": str(out / name), "base_path": str(base)}
        needs = (*ready, *made, *(["judge"] if judge else []), *(stage.name for stage in (*of_base, *attacks)))
        certified.append(f"certify-{name}")
        yield Stage(certified[-1], "certify", told, needs, out / name, "certify")
    told = {"output": str(out / "report.html")} | _options(run, "report")
    told |= {"base_path": str(base), "model_paths": [str(out / name) for name in run.models]}
    yield Stage("report", "report", told, tuple(certified), out, "report")


def base_folder(run: RunFile) -> Path:
    """Where the base lies while the run goes: in ``output_dir/base``, or in the run's own folder of an earlier run."""
    if run.base is not None and Path(run.base).is_dir() and Path(run.base).resolve().parent == run.output_dir.resolve():
        return Path(run.base)
    return run.output_dir / BASE


def _attacks(
    run: RunFile, name: str, folder: Path, needs: tuple[str, ...], control: Path | None = None
) -> Iterator[Stage]:
    """The exam of one model: harmful attacks, the benign task, and for the base random weights too.

    ``control``: the base's folder; the harmful attacks on a model follow those on its base.
    """
    role = "control" if name == BASE else "subject"
    shared = run.task | _options(run, "attack")
    told = shared | {"model_path": str(folder), "role": role}
    told |= {} if control is None else {"control_path": str(control)}
    scratch = ("attack-scratch",) if "scratch" in run.sections else ()
    follows = () if control is None else (f"attack-{BASE}", *scratch)
    yield Stage(f"attack-{name}", "attack", told, needs, folder, "attack", follows)
    if "benign" in run.sections:
        # attacks and their settings are of the harmful task, and have other names here
        common = {key: value for key, value in shared.items() if key not in ("attacks", "settings")}
        told = common | {"task": "benign"} | _options(run, "benign") | {"model_path": str(folder), "role": role}
        yield Stage(f"benign-{name}", "attack", told, needs, folder, "benign")
    if "scratch" in run.sections and name == BASE:
        told = shared | _options(run, "scratch") | {"model_path": str(folder), "role": "scratch"}
        yield Stage("attack-scratch", "attack", told, needs, folder, "scratch", (f"attack-{BASE}",))


def _options(run: RunFile, section: str) -> dict[str, Any]:
    return run.sections[section].options if section in run.sections else {}


def _refuse_places(run: RunFile, name: str, verb: str, section: Section) -> None:
    """Raise ConfigError for a section's own option that says where a model lies; an option file may have some."""
    if found := [key for key in _PLACES.get(verb, ()) if key in section.own]:
        raise ConfigError(
            f"expected no {', no '.join(found)} in section {name} of {run.path}, got one: a run keeps its models in "
            "output_dir, each under its name. Remove it."
        )


def choose(stages: Mapping[str, Stage], named: Iterable[str]) -> list[str]:
    """Names of stages for what a user calls them: a stage, or a verb for all of its stages.

    Raises:
        ConfigError: a name of neither; the nearest is named.
    """
    found: list[str] = []
    for name in named:
        fitting = [name] if name in stages else [stage.name for stage in stages.values() if stage.verb == name]
        if not fitting:
            raise ConfigError(
                f"expected a stage in {list(stages)}, or a verb for all of its stages, got {name!r}."
                f"{nearest([name], stages)}"
            )
        found += fitting
    return list(dict.fromkeys(found))


def depending(stages: Mapping[str, Stage], names: Sequence[str]) -> list[str]:
    """These stages and all that need them, directly or over others, in order."""
    found = set(names)
    for stage in stages.values():
        if found & set(stage.needs):
            found.add(stage.name)
    return [name for name in stages if name in found]


def waiting_for(stages: Mapping[str, Stage], name: str) -> set[str]:
    """All stages that cannot begin before this one is done, directly or over others."""
    found = {name}
    for stage in stages.values():
        if found & {*stage.needs, *stage.after}:
            found.add(stage.name)
    return found - {name}
