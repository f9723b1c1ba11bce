"""Sites measured together give what each gives alone: values, gradients, weights, memory, whatever the term."""

from __future__ import annotations

import pytest
import torch

from hf_immunize.errors import DecompositionError
from hf_immunize.linalg import second_moment_spectra, second_moment_spectrum
from hf_immunize.training.core import stacks
from hf_immunize.training.core.meter import Meter
from hf_immunize.training.core.objective import SIDES, GlobalObjective, MicroBatch
from hf_immunize.training.core.registry import OBJECTIVES, on_features, terms_of
from hf_immunize.training.core.terms import Rows, Term, TermSettings, evaluate_terms

WIDTHS = {"a": 40, "b": 12, "c": 40, "d": 12, "e": 40, "wide": 40}
SETTINGS = TermSettings(harmful_classes=3, group_rows=9, horizons=(30.0, 1000.0), memorization=0.1)
STRENGTH = 0.7
BOUND = 1e-10
"""Of relative differences: sums are taken in another order, and the smallest eigenvalue feels it most."""


def _moved(rows: Rows, settings: TermSettings) -> torch.Tensor:
    """A user's term: of rows, labels, spectrum and a memory of its own."""
    assert rows.features.dim() == 2 and len(rows.labels) == len(rows.features)
    before = rows.memory.get("mean", torch.zeros_like(rows.features[0]))
    rows.memory["mean"] = rows.features.detach().mean(0)
    groups = sum(part.largest for part in rows.group_spectra(settings.group_rows))
    return (rows.features[rows.labels == 1].mean(0) - before).square().sum() + rows.spectrum.largest + groups


NAMES = [name for name, terms in OBJECTIVES.items() if on_features(terms)]
OWN = (Term("harmful_moved", "harmful", _moved), *terms_of("opt_kappa"))


def objective_of(terms, sites=WIDTHS) -> GlobalObjective:
    objective = GlobalObjective(
        terms, SETTINGS, {site: (1.0 + place) / 21 for place, site in enumerate(sites)},
        weight="auto", strength=STRENGTH, shares=None, bank_rows=50, meter=Meter(),
    )
    for place, weights in enumerate(objective.weights.values()):
        weights.reference = torch.tensor(1.0 + place).double()
    return objective


def batch(step: int, part: int, rows: int, sites=WIDTHS) -> MicroBatch:
    generator = torch.Generator().manual_seed(10 * step + part)

    def features(site: str, width: int) -> torch.Tensor:
        dtype = torch.float64 if site == "wide" else torch.float32
        return torch.randn(rows, width, generator=generator, dtype=dtype) * torch.linspace(1, 3, width, dtype=dtype)

    labels = torch.arange(rows) % 3
    return MicroBatch(
        {side: {site: features(site, width) for site, width in sites.items()} for side in SIDES},
        {side: labels for side in SIDES},
    )


class Alone:
    """One site by itself, its weights, bank and memory written out."""

    def __init__(self, terms, site: str, share: float, reference: float):
        self.terms, self.site, self.share, self.reference = terms, site, share, reference
        self.norms, self.memory, self.steps = {}, {}, []

    def step(self, micros):
        rows = {side: Rows(torch.cat([micro.features[side][self.site] for micro in micros]),
                           torch.cat([micro.labels[side] for micro in micros])) for side in SIDES}
        past = {side: Rows(torch.cat([step[side].features for step in self.steps]),
                           torch.cat([step[side].labels for step in self.steps])) for side in SIDES if self.steps}
        found = evaluate_terms(self.terms, rows, SETTINGS, past=past, memory=self.memory)
        self.steps = [*self.steps, rows][-2:]
        lambdas, whole = {}, {side: torch.zeros_like(rows[side].features, dtype=torch.float64) for side in SIDES}
        for term in self.terms:
            norm = float(found.gradients[term.name].norm())
            old = self.norms.get(term.name, norm)
            self.norms[term.name] = 0.9 * old + 0.1 * norm if norm > 0 else old
            ratio = self.reference / self.norms[term.name] if self.norms[term.name] else 0.0
            lambdas[term.name] = STRENGTH * self.share * ratio
            whole[term.side] += lambdas[term.name] * found.gradients[term.name]
        return found, lambdas, whole


def difference(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours - truth).norm() / truth.norm()) if truth.any() else float(ours.norm())


@pytest.mark.parametrize("most", [2**24, 1000], ids=["one stack", "in parts"])
@pytest.mark.parametrize("terms", [*map(terms_of, NAMES), OWN], ids=[*NAMES, "own"])
def test_sites_together_are_the_sites_one_by_one(terms, most, monkeypatch):
    monkeypatch.setattr(stacks, "_NUMBERS", {"cpu": most})
    together = objective_of(terms)
    alone = [Alone(terms, site, (1.0 + place) / 21, 1.0 + place) for place, site in enumerate(WIDTHS)]
    for step in range(3):
        micros = [batch(step, part, 12) for part in range(2)]
        ours, logged = together.gradients(micros, spectra=True), together.meter.drain()
        totals = dict.fromkeys((term.name for term in terms), 0.0)
        for one in alone:
            found, lambdas, whole = one.step(micros)
            for side in SIDES:
                got = torch.cat([part[side][one.site] for part in ours])
                assert difference(got, whole[side]) <= BOUND, (step, side, one.site)
                for name in ("log_condition", "effective_rank"):
                    word = "log_kappa" if name == "log_condition" else name
                    truth = float(getattr(found.rows[side].spectrum, name).detach())
                    assert logged[f"{side}_{word}/{one.site}"] == pytest.approx(truth, rel=1e-9)
            for name, value in found.values.items():
                assert logged[f"{name}/{one.site}"] == pytest.approx(float(value), rel=1e-9)
                assert logged[f"lambda/{name}/{one.site}"] == pytest.approx(lambdas[name], rel=1e-9)
                totals[name] += one.share * float(value)
            for name, kept in one.memory.items():
                assert kept.keys() == together.memory[one.site][name].keys()
                assert all(difference(together.memory[one.site][name][key], kept[key]) <= BOUND for key in kept)
        for name, total in totals.items():
            assert logged[name] == pytest.approx(total, rel=1e-9)


def test_a_broken_site_does_not_reach_its_neighbours():
    objective, micro = objective_of(terms_of("condition_number+closed_form_adversary")), batch(0, 0, 24)
    whole = objective.gradients([micro], spectra=False)[0]
    micro.features["harmful"]["c"][3, 5] = torch.nan
    objective = objective_of(objective.terms)
    with pytest.raises(DecompositionError):  # the adversary's own solve, as for one site
        objective.gradients([micro], spectra=False)
    objective = objective_of(terms_of("condition_number"))
    broken = objective.gradients([micro], spectra=False)[0]
    values = objective.meter.drain()
    assert torch.tensor(values["harmful_r_ill/c"]).isnan() and torch.tensor(values["harmful_r_ill"]).isnan()
    assert not torch.tensor([values[f"harmful_r_ill/{site}"] for site in "abde"]).isnan().any()
    assert not broken["harmful"]["a"].isnan().any() and whole["harmful"]["a"].shape == broken["harmful"]["a"].shape


@pytest.mark.parametrize("method", ["svd", "gram"])
@pytest.mark.parametrize("rows,width", [(9, 5), (5, 9)])
def test_spectra_of_a_stack_are_those_of_its_matrices(method, rows, width):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 3, rows, width, generator=generator, dtype=torch.float64)
    whole[0, 1], whole[1, 2, :, 0] = 0.5, 0.0  # a constant one, and one of lower rank
    ours, truth = whole.clone().requires_grad_(), whole.clone().requires_grad_()
    stack = second_moment_spectra(ours, method=method)
    (stack.largest + 2 * stack.smallest + 3 * stack.frobenius_squared).sum().backward()
    for i in range(2):
        for j, spectrum in enumerate(stack.unbind()[i].unbind()):
            alone = second_moment_spectrum(truth[i, j], method=method)
            (alone.largest + 2 * alone.smallest + 3 * alone.frobenius_squared).backward()
            rank = 0 if (i, j) == (0, 1) else min(rows - 1, width - (i * j == 2))
            assert int(spectrum.rank) == int(alone.rank) == rank
            assert spectrum.status is alone.status
            assert torch.allclose(spectrum.eigenvalues, alone.eigenvalues, rtol=1e-12, atol=1e-14)
            assert torch.equal(stack.effective_rank[i, j].isnan(), alone.effective_rank.isnan())
    assert torch.allclose(ours.grad, truth.grad, rtol=1e-10, atol=1e-12)
