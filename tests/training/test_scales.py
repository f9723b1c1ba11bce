"""What a term asks of the network does not depend on the scale of the features: φ → cφ, with a head that divides."""

from __future__ import annotations

import pytest
import torch

from hf_immunize.training.core.balancing import TermWeights
from hf_immunize.training.core.registry import terms_of
from hf_immunize.training.core.terms import Rows, TermSettings, evaluate_terms

SETTINGS = TermSettings(horizons=(30.0, 300.0), memorization=0.5, group_rows=12, harmful_classes=4)


def rows(scale: float, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(40) % 4
    spectrum = torch.logspace(0, -2, 16, dtype=torch.float64)
    noise = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    return Rows(scale * spectrum * (noise + 2 * torch.nn.functional.one_hot(labels, 16)), labels)


def pull(objective: str, weight: str, scale: float) -> dict[str, torch.Tensor]:
    """λ × gradient of each term at the network that makes the features, i.e. through φ = scale·φ₁."""
    terms = terms_of(objective)
    found = evaluate_terms(terms, {"primary": rows(scale, 0), "harmful": rows(scale, 1)}, SETTINGS)
    weights = TermWeights(terms, weight, 1.0, None)
    weights.reference = torch.tensor(3.0 / scale, dtype=torch.float64)  # of the same function with a head ÷ scale
    lambdas = weights.update(found.gradients)
    return {term.name: lambdas[term.name] * found.gradients[term.name] * scale for term in terms}


@pytest.mark.parametrize("scale", [1e-3, 10.0, 1e4])
@pytest.mark.parametrize(
    "objective,weight",
    [
        ("condition_number", "auto"), ("ill_only", "auto"), ("opt_kappa", "auto"), ("group_kappa", "auto"),
        ("closed_form_adversary", "auto"), ("imma", "auto"), ("closed_form_adversary+imma+condition_number", "auto"),
        ("opt_kappa", "1"), ("group_kappa", "1"), ("closed_form_adversary", "1"), ("imma", "1"),
    ],
)  # fmt: skip
def test_rescaled_features_are_pushed_alike(objective, weight, scale):
    plain, scaled = pull(objective, weight, 1.0), pull(objective, weight, scale)
    assert all(float(value.norm()) > 1e-6 for value in plain.values())
    for name, value in plain.items():
        assert torch.allclose(value, scaled[name], rtol=1e-6, atol=1e-9 * float(value.norm())), name


@pytest.mark.parametrize("objective", ["condition_number", "ill_only"])
def test_with_a_fixed_weight_the_papers_own_terms_do_depend_on_it(objective):
    """R_ill and R_well are not scale-free in themselves (λ⁻², λ²): the balance is what makes them so."""
    plain, scaled = pull(objective, "1", 1.0), pull(objective, "1", 10.0)
    assert all(not torch.allclose(value, scaled[name], rtol=0.5) for name, value in plain.items())
