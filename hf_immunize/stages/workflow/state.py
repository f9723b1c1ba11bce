"""What was done already: a record for each stage, by digests of options, of what it read and of what it left."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_immunize.errors import RecordError, RunMismatchError
from hf_immunize.records import atomic_write, sha256_file
from hf_immunize.stages.workflow.run_file import RunFile
from hf_immunize.stages.workflow.stages import Stage
from hf_immunize.stages.workflow.watched import PLACES, digest, look, read_of, refuse_missing, sources_of


class State:
    """The records of one run file, in ``output_dir/stages``; other run files may share the folder.

    Args:
        run: the run file.
    """

    def __init__(self, run: RunFile):
        self.root, self._stages = run.output_dir, run.output_dir / "stages" / run.path.stem

    def options_file(self, stage: Stage) -> Path:
        """Where the stage finds its options; ``hf-immunize VERB --config`` of it repeats the stage."""
        return self._stages / f"{stage.name}.yaml"

    def record(self, stage: Stage) -> dict[str, Any] | None:
        """What is known of the stage's last start; None for none. Raises RecordError for a file that is damaged."""
        path = self._stages / f"{stage.name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except ValueError as error:
            raise RecordError(f"expected JSON in {path}, got {error}: delete the file, and the stage is run "
                              "again.") from error

    def why_stale(self, stage: Stage, stages: Mapping[str, Stage]) -> str | None:
        """Why the stage has to run, in words; None where its results are those of its options and of what it reads."""
        held = self.record(stage)
        if held is None:
            return "not run yet"
        if changed := _changed(read_of(stage, held["options"]), self._told(stage)):
            return changed
        if not held["finished"]:
            return "was interrupted"
        before = read_of(stage, held["sources"])
        if before != (found := sources_of(stage, before)):
            names = sorted(name for name in {*found, *before} if found.get(name) != before.get(name))
            return f"files of {', '.join(names)} changed"
        if broken := [name for name in held["results"] if not self._intact(name, held["results"][name])]:
            return f"{broken[0]} is not as it was left"
        read = self.read_by(stage, stages)
        if other := [name for name in read if held["read"].get(name) != read[name]]:
            return f"results of {', '.join(other)} changed"
        return None

    def read_by(self, stage: Stage, stages: Mapping[str, Stage]) -> dict[str, str]:
        """A digest of the results of each stage that it needs."""
        found = {}
        for name in stage.needs:
            held = self.record(stages[name]) or {"results": {}}
            told = {path: digests["sha256"] for path, digests in held["results"].items()}
            found[name] = digest(told)
        return found

    def begin(self, stage: Stage, stages: Mapping[str, Stage]) -> Path | None:
        """Write down what is started; return where the results of other options were set aside, None for none.

        A stage that was interrupted goes on in what it left, where options and what it reads are still the same.
        """
        held = self.record(stage)
        refuse_missing(stage, (held or {}).get("sources", {}))
        made = {"options": self._told(stage), "read": self.read_by(stage, stages), "finished": False,
                "sources": sources_of(stage, (held or {}).get("sources", {}))}
        aside = None
        if held is not None:
            before = held | {key: read_of(stage, held[key]) for key in ("options", "sources")}
            other = any(before[key] != made[key] for key in ("options", "read", "sources"))
            aside = self.set_aside(stage) if other else None
        self._write(stage, made | {"results": {}, "seconds": (held or {}).get("seconds")})
        text = f"# hf-immunize {stage.verb} --config {self.options_file(stage).name}\n"
        text += yaml.safe_dump(dict(stage.options), sort_keys=False, allow_unicode=True)
        atomic_write(self.options_file(stage), text.encode())
        return aside

    def finish(self, stage: Stage, stages: Mapping[str, Stage], seconds: float) -> None:
        """Write down that the stage is whole, with what it left. Raises RecordError where it left nothing."""
        made = self.record(stage) or {}
        found = stage.results()
        if not found or not all(path.is_file() for path in found):
            told = ", ".join(map(str, found)) or f"traces in {stage.folder}"
            raise RecordError(f"expected {told} of the stage {stage.name}, got no such file: see its log.")
        results = {self._name(path): look(path) | {"sha256": sha256_file(path)} for path in found}
        if stage.makes_model:
            results |= self._model_files(stage.folder)
        made |= {"finished": True, "results": results, "seconds": round(seconds, 1)}
        self._write(stage, made)

    def _model_files(self, folder: Path) -> dict[str, Any]:
        """Weights and the like, by the digests that the stage itself took when it left them."""
        files = json.loads((folder / "run.json").read_text(encoding="utf-8"))["files"]
        return {self._name(folder / name): look(folder / name) | {"sha256": digest} for name, digest in files.items()}

    def set_aside(self, stage: Stage) -> Path | None:
        """Move the results of the stage, so that others can take their place; where to, None where there are none."""
        if stage.verb in ("certify", "report"):
            return None  # written anew in one go
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        target = self.root / "replaced" / f"{stage.name}-{now}"
        moved = [stage.folder] if stage.makes_model else stage.results()
        moved = [path for path in moved if path.exists()]
        for path in moved:
            place = target if stage.makes_model else target / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, place)
        return target if moved else None

    def _told(self, stage: Stage) -> dict[str, Any]:
        """The options as JSON has them, without the place of the run: a folder that was moved is the same run."""
        root = os.path.abspath(self.root)

        def plain(name: str, value: Any) -> Any:
            if isinstance(value, list):
                return [plain(name, part) for part in value]
            if not isinstance(value, str) or not name.endswith(PLACES):
                return value
            at = os.path.abspath(os.path.expanduser(value))
            meant = name.startswith("output") or os.path.isabs(value) or os.path.exists(at)  # and no id on the Hub
            below = meant and (at == root or at.startswith(root + os.sep))
            return f"<output_dir>{at.removeprefix(root)}" if below else value

        told = {name: plain(name, value) for name, value in read_of(stage, stage.options).items()}
        return json.loads(json.dumps(told, default=str))

    def _write(self, stage: Stage, made: Mapping[str, Any]) -> None:
        atomic_write(self._stages / f"{stage.name}.json", json.dumps(made, indent=1, default=str).encode())

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self.root)

    def _intact(self, name: str, held: Mapping[str, Any]) -> bool:
        """Whether a file is as it was left: by size and time, else by content."""
        path = self.root / name
        if not path.is_file():
            return False
        return look(path) == {key: held[key] for key in ("size", "time")} or sha256_file(path) == held["sha256"]


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Which options differ, in words."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    told = [f"{name} {_short(before.get(name))} -> {_short(now.get(name))}" for name in names]
    return ", ".join(told) or None


def _short(value: Any) -> str:
    text = "default" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


class Lock:
    """Keeps two runs out of one folder. It is held by the stages too, so that one that outlived a killed run counts."""

    def __init__(self, root: Path):
        self._path = root / "stages" / "running"
        self.file: Any = None

    def __enter__(self) -> Lock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115  (held for the length of the run)
        try:
            import fcntl
        except ImportError:  # Windows has none; two runs at once are then the user's to avoid
            return self
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.seek(0)
            told = self.file.read().strip() or "another process"
            self.file.close()
            raise RunMismatchError(
                f"expected no other run in {self._path.parents[1]}, got one at work ({told}): wait for it, or end "
                "it. A "
                "stage of a run that was killed goes on to its end."
            ) from error
        self.tell(f"process {os.getpid()}")
        return self

    def tell(self, who: str) -> None:
        """Say who is at work, for whom it keeps out."""
        self.file.seek(0)
        self.file.truncate()
        self.file.write(who)
        self.file.flush()

    def __exit__(self, *_: Any) -> None:
        self.file.close()
