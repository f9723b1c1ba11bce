"""Build the wheel, install it in a new environment away from the clone, and run a newcomer's main job there.

    python .ci/clean_install.py [--data FOLDER] [--output FOLDER] [--whole] [--reuse]

Needs pip alone. With a folder of trained weights and photos the job is a real one (newcomer.py); it is looked for in
HF_IMMUNIZE_DATA and in shared/data beside the clone. What the job leaves is copied to --output in the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("hf_immunize", "recipes", "pyproject.toml", "setup.py", "README.md", "LICENSE")
"""What a wheel is made of."""


def run(*words: str | Path, **options: object) -> None:
    """One command; a failure ends the program."""
    print("$", *words, flush=True)
    subprocess.run([str(word) for word in words], check=True, **options)


def clean() -> dict[str, str]:
    """The environment without what would make packages of elsewhere pass for installed ones."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def pip(*words: str | Path) -> None:
    """pip of this interpreter, quietly."""
    run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words, env=clean())


def build(work: Path, *words: str) -> Path:
    """The wheel, from a copy of its sources, so that nothing of an earlier build gets in; ``words`` go to pip."""
    source = work / "source"
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=left_out)
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", *words, "--wheel-dir", work / "wheel", source)
    (wheel,) = (work / "wheel").glob("*.whl")
    return wheel


def install(wheel: Path, place: Path, reuse: bool, extra: str = "") -> Path:
    """The Python of a new environment with the wheel in it; with ``reuse`` its dependencies are those that are here.

    Those are found by a line in a .pth file: it leads to packages that lie there, and to none that are linked from
    there, as the clone itself is by ``pip install -e``.
    """
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    if reuse:
        pip("--python", python, "install", "--no-deps", "--no-index", wheel)
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.check_output([python, "-c", code], text=True, env=clean())
        Path(site.strip(), "reused.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    else:
        words = (ROOT / "Makefile").read_text(encoding="utf-8").split()
        torch = next(word for word in words if word.startswith("torch=="))
        pip("--python", python, "install", "-c", ROOT / "constraints.txt", torch, f"{wheel}{extra}")
    return python


def newcomer(python: Path, work: Path, data: Path | None, whole: bool = False) -> None:
    """The main job in ``work/job``, by the environment alone."""
    shutil.copy(ROOT / ".ci" / "newcomer.py", work)
    more = [*([] if data is None else ["--data", data.resolve()]), *(["--whole"] if whole else [])]
    run(python, work / "newcomer.py", work / "job", *more, cwd=work, env=clean())


def found_data() -> Path | None:
    """The folder of weights and photos, if there is one."""
    places = [Path(os.environ["HF_IMMUNIZE_DATA"])] if "HF_IMMUNIZE_DATA" in os.environ else []
    return next((place for place in [*places, ROOT.parent / "shared" / "data"] if place.is_dir()), None)


def main() -> None:
    """Wheel, environment, job."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=found_data(), help="Folder of trained weights and photos.")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "newcomer", help="Where the job is copied to.")
    parser.add_argument("--whole", action="store_true", help="The whole exam, which takes hours with real weights.")
    parser.add_argument("--reuse", action="store_true", help="Take dependencies from this environment.")
    given = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder:
        work = Path(folder).resolve()
        wheel = build(work)
        python = install(wheel, work / "venv", given.reuse, extra="[demo]")
        print(f"({time.perf_counter() - start:.0f} s to build and install)", flush=True)
        newcomer(python, work, given.data, given.whole)
        shutil.rmtree(given.output, ignore_errors=True)
        shutil.copytree(work / "job" / "job", given.output)
    print(f"{given.output}: report, certificate and models. {time.perf_counter() - start:.0f} s altogether")


if __name__ == "__main__":
    main()
