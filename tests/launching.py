"""Scripts on one process, or on several that accelerate's launcher starts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

from filelock import FileLock

from hf_immunize.training.core.launching import leave_processes

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "accelerate"
LOCK = Path(tempfile.gettempdir()) / f"hf_immunize-launch-{os.getuid()}.lock"
"""One launch at a time: the launcher looks for a free port and opens it later; two at once may take the same one."""


def run_script(script: Path, *words: str, config: str = "", processes: int = 1, timeout: float = 500, **more: str):
    """Run a script to its end: alone, as ``processes`` of torchrun, or under one of the recipes' accelerate files.

    ``more`` is environment.
    """
    launch = [sys.executable]
    if config:
        launch += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
        launch += ["--main_process_port", "0"]
    elif processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    paths = [str(ROOT / "tests" / "training"), str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(paths), **more,
    }  # fmt: skip
    with FileLock(LOCK) if config else nullcontext():
        done = subprocess.run(
            [*launch, str(script), *words], capture_output=True, text=True, env=environment, timeout=timeout, cwd=ROOT
        )
    assert done.returncode == 0, _told(done.stderr)


def leave() -> None:
    """Last line of such a script: meet the other processes and end at once.

    Meshes keep gloo's threads alive to the end, and a thread that drops a tensor while the interpreter is taken down
    aborts the process, after its work is done (pytorch/pytorch#179291).
    """
    leave_processes()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _told(stderr: str) -> str:
    """What the processes said before the launcher's own report, whose length would hide it."""
    own, _, report = stderr.partition("ChildFailedError")
    return f"{report[-1500:]}\n---- the processes' own words ----\n{own[-4000:]}"
