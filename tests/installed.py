"""The built wheel in an environment away from the clone: commands as a user types them, by what is installed alone."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
_SPEC = importlib.util.spec_from_file_location("clean_install", ROOT / ".ci" / "clean_install.py")
clean_install = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(clean_install)
_WHERE = """
import json, sys
from pathlib import Path
import hf_immunize
found = [place for place in sys.path if (Path(place) / "hf_immunize" / "__init__.py").is_file()]
print(json.dumps({"file": hf_immunize.__file__, "found": found, "finders": [str(item) for item in sys.meta_path]}))
"""


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel; the clone cannot be imported there."""

    python: Path

    def environment(self, folder: Path) -> dict[str, str]:
        """What a shell of a user has in it, with one thread and a cache in ``folder``."""
        return clean_install.clean() | {"OMP_NUM_THREADS": "1", "HF_IMMUNIZE_CACHE": str(folder / "cache"),
                                        "HF_HUB_OFFLINE": "1"}

    def call(self, folder: Path, *words: object, expect: int = 0) -> str:
        """``hf-immunize WORDS`` in ``folder``; what it prints."""
        done = subprocess.run([self.python.with_name("hf-immunize"), *map(str, words)], cwd=folder,
                              env=self.environment(folder), capture_output=True, text=True)
        assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def check(self, folder: Path) -> None:
        """The package comes from the environment, and from nowhere in the clone."""
        done = subprocess.run([self.python, "-c", _WHERE], cwd=folder, env=self.environment(folder),
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told, own = json.loads(done.stdout), self.python.parents[1]
        assert Path(told["file"]).is_relative_to(own) and not own.is_relative_to(ROOT), told
        assert Path(told["found"][0]).is_relative_to(own) and str(ROOT) not in told["found"], told
        assert not [name for name in told["finders"] if "editable" in name], told


def build_wheel(work: Path) -> Path:
    """The wheel, built with what is installed here; skips where that cannot build one."""
    held = {name: Version(version(name)) for name in ("pip", "setuptools") if find_spec(name)}
    if held.get("setuptools", Version("0")) < Version("77"):
        pytest.skip("pyproject.toml asks for setuptools 77 or newer")
    if "pip" not in held:
        pytest.skip("a wheel is built and installed by pip, which is not there")
    return clean_install.build(work, "--no-build-isolation")


def install(wheel: Path, work: Path) -> Installed:
    """The wheel in a new environment; what it depends on is that of the environment that tests run in."""
    found = Installed(clean_install.install(wheel, work / "venv", reuse=True))
    (work / "elsewhere").mkdir()
    found.check(work / "elsewhere")
    return found
