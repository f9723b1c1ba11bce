"""Execute the notebooks of docs/ in place: ``python docs/tools/notebooks.py`` (needs the extra ``docs``).

Outputs are kept, without progress bars, warnings and times, so that the same result is the same file.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def execute(path: Path) -> Any:
    """The notebook with the outputs of a fresh kernel in an empty folder."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main(check: bool) -> None:
    """Execute all of them; with ``check`` nothing is written, and a cell that fails ends the program."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = execute(path)
        if not check:
            path.write_text(nbformat.writes(notebook, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path.name}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
