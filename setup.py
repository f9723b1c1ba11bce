"""What pyproject.toml cannot say: recipes/ is a package of another name, and the README's links lead somewhere.

The option files and scripts of recipes/ go into the wheel as the folder hf_immunize/presets. With the address of the
repository in HF_IMMUNIZE_REPOSITORY, which the release script sets, relative links of README.md become absolute, so
that it reads on the package index, and the package names its addresses.
"""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def absolute(text: str, repository: str) -> str:
    """The text with every relative link of Markdown led to the repository; pictures to the files themselves."""
    text = re.sub(r"(!\[[^\]]*\])\((?!https?:)([^)\s]+)\)", rf"\1({repository}/raw/main/\2)", text)
    return re.sub(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)", rf"]({repository}/blob/main/\1)", text)


def addresses(repository: str) -> dict[str, str]:
    """Where what is found, for the package index."""
    return {
        "Homepage": repository, "Source": repository, "Issues": f"{repository}/issues",
        "Documentation": f"{repository}/tree/main/docs", "Changelog": f"{repository}/blob/main/CHANGELOG.md",
    }  # fmt: skip


if __name__ == "__main__":
    repository = os.environ.get("HF_IMMUNIZE_REPOSITORY", "").rstrip("/")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(
        packages=[*find_packages(include=["hf_immunize*"]), "hf_immunize.presets"],
        package_dir={"hf_immunize.presets": "recipes"},
        long_description=absolute(readme, repository) if repository else readme,
        long_description_content_type="text/markdown",
        project_urls=addresses(repository) if repository else {},
    )
