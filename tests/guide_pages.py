"""The guides in docs/extend: their code blocks as files, and plug-ins that come and go."""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager
from pathlib import Path

from hf_immunize import plugins
from hf_immunize.attacks import ATTACKS

DOCS = Path(__file__).parents[1] / "docs" / "extend"


def files_of(page: str, folder: Path) -> list[Path]:
    """Every Python block of a page that begins with the name of a file, written under that name."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, flags=re.S)
    assert len(blocks) == 2, f"{page} has one file and its test"
    paths = []
    for name, block in blocks:
        paths.append(folder / name)
        paths[-1].write_text(block, encoding="utf-8")
    return paths


@contextmanager
def plugged(monkeypatch, *files: Path, names: tuple[str, ...] = (), table=ATTACKS):
    """``files`` as the only plug-ins; what they registered is forgotten afterwards."""
    with monkeypatch.context() as patch:
        patch.setenv(plugins.VARIABLE, ",".join(map(str, files)))
        patch.setattr(plugins, "_loaded", {})
        for file in files:
            patch.syspath_prepend(str(file.parent))
            patch.delitem(sys.modules, file.stem, raising=False)
        try:
            yield
        finally:
            for file in files:
                sys.modules.pop(file.stem, None)
            for name in names:
                table.pop(name, None)
