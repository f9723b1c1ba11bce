"""Makes ``tests/trace_builders.py`` importable here, and builds tiny attacked model folders."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_exam import make_exam_data, sit_exam, train_base


@pytest.fixture(scope="session")
def exam_data():
    return make_exam_data()


@pytest.fixture(scope="session")
def trained_base(tmp_path_factory, exam_data):
    """A tiny ViT that knows the two-class primary task, attacked in both roles. Copy it; do not change it."""
    folder = train_base(tmp_path_factory.mktemp("models") / "base")
    sit_exam(folder, "control", exam_data)
    sit_exam(folder, "subject", exam_data)
    return folder


@pytest.fixture
def exam_folders(tmp_path, trained_base):
    """Fresh copies: (base with control traces, the base itself attacked as the subject)."""
    base, subject = tmp_path / "base", tmp_path / "subject"
    shutil.copytree(trained_base, base, ignore=shutil.ignore_patterns("subject"))
    shutil.copytree(trained_base, subject, ignore=shutil.ignore_patterns("control"))
    return base, subject
