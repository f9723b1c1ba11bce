"""Copies of a base in other coordinates, and other models that hinder only those who look no further: none resists."""

import planted
import pytest
import torch
from tiny_exam import sit_exam

from hf_immunize.attacks import load_classifier
from hf_immunize.certification import Protocol, build_certificate

SETTINGS = {
    "ridge_probe": {"penalty": (1e-3, 1e-5), "features": ("standardized", "centered")},
    "full_finetune": {"steps": (60,), "learning_rate": (1e-3, 3e-3)},
    "canonical_finetune": {"steps": (60,), "learning_rate": (1e-3, 3e-3)},
}
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    folder = planted.train_base(tmp_path_factory.mktemp("coordinates") / "base")
    sit_exam(folder, "control", planted.exam_of_digits(), SEEDS, tuple(SETTINGS), SETTINGS)
    return folder


def verdicts_of(base, folder):
    """Verdicts of cells and of families, and the certificate; prints each cell's reason for whoever reads a failure."""
    exam = planted.exam_of_digits()
    sit_exam(folder, "subject", exam, SEEDS, tuple(SETTINGS), SETTINGS)
    certificate = build_certificate(folder, base, exam[0], Protocol(attacks=tuple(SETTINGS), seeds=SEEDS))
    for cell in certificate.cells:
        print(folder.name, cell.attack, cell.verdict, cell.reason, cell.control.steps_to_threshold)
    families = {family.family: family.verdict for family in certificate.families}
    return {cell.attack: cell.verdict for cell in certificate.cells}, families, certificate


@pytest.mark.slow
@pytest.mark.parametrize("what", [
    "gains",
    *(pytest.param(name, marks=pytest.mark.slow) for name in planted.COORDINATES if name != "gains"),
])  # fmt: skip
def test_a_base_in_other_coordinates_resists_nothing(base, tmp_path, what):
    folder = planted.plant(base, tmp_path / what, what)
    pixels = planted.digit_rows(range(5), 1, "x", 0.6, 1.0).pixel_values
    with torch.no_grad():
        wanted, found = (load_classifier(path).eval()(pixel_values=pixels).logits for path in (base, folder))
    assert torch.allclose(wanted, found, atol=1e-3 * float(wanted.abs().max()))
    cells, families, certificate = verdicts_of(base, folder)
    assert cells["canonical_finetune"] == "FAILS" == families["full fine-tuning"] == certificate.overall
    if what in ("gains", "heads", "dropout"):  # what is planted does hinder whoever trains it as it is
        assert cells["full_finetune"] != "FAILS"


@pytest.mark.slow
@pytest.mark.parametrize("what", planted.HINDRANCES)
def test_units_that_are_switched_off_resist_nothing(base, tmp_path, what):
    _, _, certificate = verdicts_of(base, planted.plant(base, tmp_path / what, what))
    assert certificate.overall == "FAILS"


@pytest.mark.slow
def test_a_model_that_helps_the_attacker_fails(base, tmp_path):
    cells, _, certificate = verdicts_of(base, planted.help_attackers(base, tmp_path / "helpful"))
    assert set(cells.values()) == {"FAILS"} and certificate.overall == "FAILS"
