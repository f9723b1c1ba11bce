"""One optimizer step: its micro-batches, the gradients of the terms at their features, and how these enter the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_immunize.linalg.precondition import InverseMoment
from hf_immunize.training.core.balancing import TermWeights
from hf_immunize.training.core.meter import Meter
from hf_immunize.training.core.objective import SIDES, GlobalObjective, MicroBatch, SiteGradients
from hf_immunize.training.core.preconditioning import Preconditioner
from hf_immunize.training.core.references import unmoved
from hf_immunize.training.core.weight_terms import WeightTerms


@dataclass(frozen=True)
class Measured:
    """A micro-batch after its forwards: features and labels, and inputs of preconditioned layers by side."""

    batch: MicroBatch
    inputs: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Plan:
    """What one micro-batch injects: gradients at its features, and K̃⁻¹ of the preconditioned layers by side."""

    gradients: SiteGradients
    inverses: Mapping[str, Mapping[str, tuple[InverseMoment, float]]]


class Step:
    """The immunization terms of one optimizer step after another.

    A trainer calls ``begin`` with ways to run each micro-batch, adds ``injected`` to each micro-batch's loss, and,
    where there are terms on weights, calls ``add_weight_gradients`` when the gradients of the whole step are there.

    Terms on features are those of the *global* batch: of all ranks and micro-batches. With one micro-batch its features
    are measured once. With several they are computed twice: without gradient for all of them together, then with
    gradient for each, so that accumulating gives the gradient of one large batch exactly.

    Args:
        objective: terms on features; None for none.
        weight_terms: terms on weights; None for none.
        meter: is told of values and λ.
        optional_sites: whether a site that depends on nothing trained is left alone, or is an error.
    """

    def __init__(
        self,
        objective: GlobalObjective | None,
        weight_terms: WeightTerms | None,
        meter: Meter,
        *,
        preconditioner: Preconditioner | None = None,
        optional_sites: bool = False,
    ):
        self.objective, self.weight_terms, self.preconditioner = objective, weight_terms, preconditioner
        self._meter, self._optional = meter, optional_sites
        self._plans: list[_Plan] = []
        self._spectra = False
        self.place = 0
        """Which micro-batch comes next, counting from 0."""

    @property
    def sites(self) -> list[str]:
        """Where features are measured; empty without terms on features."""
        return self.objective.sites if self.objective is not None else []

    @property
    def looks_ahead(self) -> bool:
        """Whether the micro-batches of this step were measured together, so that each runs twice."""
        return bool(self._plans)

    def begin(self, micro_batches: Sequence[Callable[[], Measured]], *, spectra: bool) -> None:
        """Start an optimizer step.

        Args:
            micro_batches: run one micro-batch's forwards; called under ``no_grad``, and only where there are several.
            spectra: whether spectra are put in the log.
        """
        self._spectra, self.place, self._plans = spectra, 0, []
        if self.objective is not None and len(micro_batches) > 1:
            with torch.no_grad():
                self._plans = self._plans_of([measure() for measure in micro_batches])

    def injected(self, measured: Measured, scale: float) -> Tensor | float:
        """A scalar of value zero whose gradient at the features of the next micro-batch is that of the terms.

        Args:
            scale: what the trainer divides losses by afterwards (micro-batches, ranks), as suits a mean over rows. The
                terms are one number of the whole global batch.

        Raises:
            ConfigError: a site whose input depends on nothing that is trained.
        """
        if self.objective is None:
            return 0.0
        plan = self._plans[self.place] if self._plans else self._plans_of([measured])[0]
        self.place += 1
        total: Tensor | float = 0.0
        for side in SIDES:
            inner: Tensor | float = 0.0
            for site in self.sites:
                features = measured.batch.features[side][site]
                if not features.requires_grad:
                    if self._optional:
                        continue
                    raise unmoved(site)
                product = (features * (scale * plan.gradients[side][site]).to(features)).sum()
                inner = inner + product - product.detach()
            if self.preconditioner is not None and isinstance(inner, Tensor):
                inner = inner + self.preconditioner.correction(inner, plan.inverses[side])
            total = total + inner
        return total

    def _plans_of(self, measured: Sequence[Measured]) -> list[_Plan]:
        assert self.objective is not None
        gradients = self.objective.gradients([micro.batch for micro in measured], spectra=self._spectra)
        inverses: dict[str, Mapping[str, tuple[InverseMoment, float]]] = {}
        if self.preconditioner is not None:
            for side in SIDES:
                layers = {name: [micro.inputs[side][name] for micro in measured] for name in self.preconditioner.layers}
                inverses[side] = self.preconditioner.inverses(layers)
        return [_Plan(found, inverses) for found in gradients]

    def to(self, device: torch.device) -> None:
        """Move what simulated attackers hold: they copied the model before it was there."""
        for objective in self.weight_terms.objectives.values() if self.weight_terms is not None else ():
            objective.to(device)

    def add_weight_gradients(self, model: nn.Module, step: int) -> None:
        """Add the gradients of the terms on weights, once those of the whole step are complete on every rank."""
        if self.weight_terms is not None:
            self._meter.add(self.weight_terms.add_gradients(model, step))

    @property
    def weights(self) -> dict[str, TermWeights]:
        """Every balance, by site; that of the terms on weights under the empty name."""
        found = dict(self.objective.weights) if self.objective is not None else {}
        return found | ({"": self.weight_terms.weights} if self.weight_terms is not None else {})

    @property
    def factor(self) -> float:
        """What the utility guard multiplies the strength with, everywhere."""
        return next(iter(self.weights.values())).factor

    @factor.setter
    def factor(self, value: float) -> None:
        for weights in self.weights.values():
            weights.factor = value

    @property
    def strength(self) -> float:
        """The strength in force, after the guard's factor."""
        return next(iter(self.weights.values())).strength * self.factor

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors."""
        parts = {"objective": self.objective, "on weights": self.weight_terms}
        return {f"{part}:{name}": value for part, held in parts.items() if held is not None
                for name, value in held.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        for part, held in (("objective", self.objective), ("on weights", self.weight_terms)):
            start = f"{part}:"
            if held is not None:
                held.load_state({n.removeprefix(start): v for n, v in state.items() if n.startswith(start)})
