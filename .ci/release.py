"""Build sdist and wheel, check them, install the wheel in a new environment, and run the main job there, off the clone.

    python .ci/release.py [--tag v1.2.3] [--repository URL] [--reuse]

Needs build and twine. With --repository, the links of README.md become absolute and the package names its addresses.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"


def run(*words: str | Path, **options: object) -> None:
    """One command; a failure ends the release."""
    print("$", *words, flush=True)
    subprocess.run([str(word) for word in words], check=True, **options)


def clean() -> dict[str, str]:
    """The environment without what would make packages of elsewhere pass for installed ones."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def version() -> str:
    """The version of the package, from its file."""
    text = (ROOT / "hf_immunize" / "version.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "(.+)"', text)[1]


def check_version(tag: str | None) -> None:
    """The tag is that of the version, and the changelog tells of it."""
    if tag is not None and tag != f"v{version()}":
        sys.exit(f"expected the tag v{version()} of hf_immunize/version.py, got {tag}: change one of them.")
    if f"## [{version()}]" not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        sys.exit(f"expected a section [{version()}] in CHANGELOG.md, got none: write what changed.")


def build(repository: str | None) -> Path:
    """Sdist, and the wheel from it; both checked as the index does it."""
    shutil.rmtree(DIST, ignore_errors=True)
    environment = os.environ | ({"HF_IMMUNIZE_REPOSITORY": repository} if repository else {})
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT, env=environment)
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted(DIST.iterdir()))
    (wheel,) = DIST.glob("*.whl")
    return wheel


def install(wheel: Path, place: Path, reuse: bool) -> Path:
    """The Python of a new environment with the wheel in it; with ``reuse`` its dependencies are those that are here."""
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if reuse:
        run(*pip, "--no-deps", wheel, env=clean())
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.check_output([python, "-c", code], text=True, env=clean())
        Path(site.strip(), "reused.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    else:
        words = (ROOT / "Makefile").read_text(encoding="utf-8").split()
        torch = next(word for word in words if word.startswith("torch=="))
        run(*pip, "-c", ROOT / "constraints.txt", torch, f"{wheel}[demo]", env=clean())
    return python


def main() -> None:
    """The release, step by step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", help="The tag that is released.")
    parser.add_argument("--repository", help="Address of the repository.")
    parser.add_argument("--reuse", action="store_true", help="Take dependencies from this environment.")
    given = parser.parse_args()
    check_version(given.tag or None)
    wheel = build(given.repository or None)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        python = install(wheel, work / "venv", given.reuse)
        shutil.copy(ROOT / ".ci" / "newcomer.py", work)
        run(python, work / "newcomer.py", work / "job", cwd=work, env=clean())
    print("\n".join(f"{path.relative_to(ROOT)}  {path.stat().st_size:,} bytes" for path in sorted(DIST.iterdir())))


if __name__ == "__main__":
    main()
