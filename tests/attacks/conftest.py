"""Attackers' contexts over tiny saved models."""

import pytest

from hf_immunize.attacks import AttackContext
from hf_immunize.data import fingerprint


@pytest.fixture
def make_context(tmp_path, make_vit, make_pixels):
    def build(role="control", labels=4, seed=0, rows=60, fraction=0.8, model=None, **options):
        folder = tmp_path / f"model{labels}-{seed}"
        if not folder.exists():
            (model or make_vit(labels=labels, seed=seed)).save_pretrained(folder)
        splits = {
            name: make_pixels(rows=count, classes=3, seed=place)
            for place, (name, count) in enumerate((("attack", rows), ("validation", 15), ("test", 21)))
        }
        prints = tuple(fingerprint(split, source="blobs", role=name) for name, split in splits.items())
        return AttackContext(folder=folder, role=role, data=prints, attack_fraction=fraction, **splits, **options)

    return build
