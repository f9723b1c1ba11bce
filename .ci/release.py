"""Build sdist and wheel, check them, install the wheel in a new environment, and run the main job there, off the clone.

    python .ci/release.py [--tag v1.2.3] [--repository URL] [--reuse]

Needs build and twine. With --repository, the links of README.md become absolute and the package names its addresses.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from clean_install import install, newcomer, run

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"


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
        work = Path(folder).resolve()
        newcomer(install(wheel, work / "venv", given.reuse, extra="[demo]"), work, data=None)
    print("\n".join(f"{path.relative_to(ROOT)}  {path.stat().st_size:,} bytes" for path in sorted(DIST.iterdir())))


if __name__ == "__main__":
    main()
