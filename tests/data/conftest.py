"""What tests of data read from the log."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture
def warned():
    """What this package warned of since the last call."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    names = ["data.classes", "data.copies", "data.folders", "data.tables", "data.tasks", "diffusion.tasks"]
    loggers = [logging.getLogger(f"hf_immunize.{name}") for name in names]
    handler = Collect(level=logging.WARNING)
    for logger in loggers:
        logger.addHandler(handler)

    def take() -> list[str]:
        taken = lines[:]
        lines.clear()
        return taken

    yield take
    for logger in loggers:
        logger.removeHandler(handler)
