"""A stage that writes the files that a real one would, by its kind: ``fake_stage.py KIND NAME OPTIONS FOLDER``."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path


def main(kind: str, name: str, options: str, folder: str) -> None:
    job, place = Path(options).parents[2], Path(folder)

    def asked(what: str) -> bool:
        return (job / what).is_file() and (job / what).read_text() == name

    with open(job / "started", "a") as log:
        log.write(f"{name}\n")
    if asked("fail"):
        print("this is why")
        sys.exit(3)
    if asked("slow"):
        (job / "at-work").write_text(str(os.getpid()))
        time.sleep(120)
    if asked("empty"):
        return
    place.mkdir(parents=True, exist_ok=True)
    # what a base is does not depend on its options here, all else does
    content = "base" if kind == "pretrain" else Path(options).read_text()
    if kind in ("pretrain", "immunize"):
        (place / "model.safetensors").write_text(content)
        digest = hashlib.sha256(content.encode()).hexdigest()
        (place / "run.json").write_text(json.dumps({"files": {"model.safetensors": digest}}))
    elif kind == "attack":
        traces = place / "traces" / ("control" if name.endswith("base") else "subject")
        traces.mkdir(parents=True, exist_ok=True)
        (traces / "lora__a__seed0.json").write_text(json.dumps([content, time.time()]))
    elif kind == "certify":
        traces = sorted(path for role in ("control", "subject") for path in job.rglob(f"traces/{role}/*.json"))
        (place / "certificate.json").write_text(content + "".join(path.read_text() for path in traces))
        (place / "README.md").write_text("card")
    else:
        (place / "report.html").write_text(content)
    print(f"{name} is made")


def run_fakes(path: Path) -> None:
    """``hf-immunize run`` with these stages, in a process of its own."""
    from hf_immunize.stages import run
    from hf_immunize.stages.workflow.launch import Launcher

    def words(self, stage, options):
        return [sys.executable, "-S", __file__, stage.kind, stage.name, str(options), str(stage.folder)]

    Launcher.words = words
    run._check_options = lambda run, stale: None
    run.run_file(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
