"""What the site adds to the pages of docs/: the reference of the command line, and links that lead out of docs/.

With the address of the repository in HF_IMMUNIZE_REPOSITORY, links to files outside docs/ lead there; without it they
become the file's name, so that every link of the built site leads somewhere.
"""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath
from typing import Any

from cli_page import page as cli_page

CLI = "reference/cli.md"
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(text: str, page: Any, config: Any, files: Any) -> str:
    """The reference of the command line in the place of its page; elsewhere, links that leave docs/ led on."""
    if page.file.src_uri == CLI:
        return cli_page()
    repository = os.environ.get("HF_IMMUNIZE_REPOSITORY", "").rstrip("/")
    return outward(text, PurePosixPath(page.file.src_uri), repository)


def outward(text: str, page: PurePosixPath, repository: str) -> str:
    """The text of a page with every link to a file outside docs/ led to the repository, or made its name."""

    def replace(found: re.Match[str]) -> str:
        name, target, anchor = found[1], found[2], found[3] or ""
        path = os.path.normpath(PurePosixPath("docs") / page.parent / target)
        if re.match(r"\w+:", target) or path.startswith("docs" + os.sep):
            return found[0]
        return f"[{name}]({repository}/blob/main/{path}{anchor})" if repository else f"{name} (`{path}`)"

    return _LINK.sub(replace, text)
