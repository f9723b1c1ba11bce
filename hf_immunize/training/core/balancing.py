"""Weights of the terms: fixed numbers, or balanced gradient norms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_immunize.errors import ConfigError


def parse_numbers(text: str | None, names: list[str], option: str) -> dict[str, float]:
    """``"a=1,b=2"`` as a dict over known names. Raises ConfigError for an unknown name or a value that is no number."""
    if not text:
        return {}
    try:
        pairs = {name.strip(): float(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise ConfigError(f"expected {option} like '{names[0]}=0.5', got {text!r}: {error}.") from error
    unknown = sorted(set(pairs) - set(names))
    if unknown:
        raise ConfigError(f"expected {option} of terms {names}, got {unknown}.")
    return pairs


def check_numbers(options: Any, terms: Iterable[Any]) -> None:
    """Raise ConfigError for a weight or a share of a term that the objective does not have."""
    names = [term.name for term in terms]
    if "=" in options.weight:
        parse_numbers(options.weight, names, "weight")
    parse_numbers(options.term_shares, names, "term_shares")


def numbers_of(options: Any, terms: Iterable[Any]) -> dict[str, Any]:
    """``weight`` and ``shares`` of the options as far as they name these terms, where a run has others beside them."""
    names = {term.name for term in terms}

    def own(text: str | None) -> str | None:
        if not text or "=" not in text:
            return text
        return ",".join(part for part in text.split(",") if part.partition("=")[0].strip() in names) or None

    return {"weight": own(options.weight) or "1", "shares": own(options.term_shares)}


class TermWeights:
    """λ of every term (Zheng et al. 2025, Algorithm 1: λ_P, λ_H).

    ``auto``: λ_j = strength · share_j · G / ḡ_j, where ḡ_j is a running mean of the Frobenius norm of the term's
    nonzero gradients at the features and G the norm of the primary loss's gradient there when every label is wrong:
    how hard the primary task can pull back. G is measured once, before training, because at a converged model the
    gradient of the primary loss itself is close to nothing and would balance the terms away.
    """

    DECAY = 0.9

    def __init__(
        self, terms: Sequence[Any], weight: str, strength: float, shares: str | None, site_share: float = 1.0
    ):
        names = [term.name for term in terms]
        self.strength, self.site_share = strength, site_share
        self.factor = 1.0
        """What the utility guard multiplies the strength with."""
        self.shares = {name: 1.0 for name in names} | parse_numbers(shares, names, "term_shares")
        self.fixed: dict[str, float] | None = None
        if weight != "auto":
            try:
                self.fixed = {name: float(weight) for name in names}
            except ValueError:
                self.fixed = {name: 1.0 for name in names} | parse_numbers(weight, names, "weight")
        for option, values in (("weight", self.fixed or {}), ("term_shares", self.shares)):
            if wrong := {name: value for name, value in values.items() if not value >= 0}:
                raise ConfigError(f"expected {option} of at least 0, got {wrong}: a term's sign is in its formula.")
        self.reference: Tensor | None = None
        self.norms: dict[str, Tensor] = {}

    @property
    def needs_reference(self) -> bool:
        """Whether G still has to be measured."""
        return self.fixed is None and self.reference is None

    def update(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """λ for this step, as zero-dimensional float64 tensors on the gradients' device."""
        together = update_together([self], {name: gradient[None] for name, gradient in gradients.items()})
        return {name: value[0] for name, value in together.items()}

    def of_norms(self, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """λ for this step from the norms of the terms' gradients, as float64 scalars on the norms' device."""
        together = weights_of_norms([self], {name: norm.reshape(1) for name, norm in norms.items()})
        return {name: value[0] for name, value in together.items()}

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors."""
        kept = {"factor": torch.tensor([self.factor]).double()[0]}
        kept |= {f"norm.{name}": norm.detach().cpu().reshape(()) for name, norm in self.norms.items()}
        if self.reference is not None:
            kept["reference"] = self.reference.detach().cpu().reshape(())
        return kept

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        self.factor = float(state["factor"])
        self.reference = state.get("reference")
        self.norms = {name.removeprefix("norm."): norm for name, norm in state.items() if name.startswith("norm.")}


def update_together(sites: Sequence[TermWeights], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``TermWeights.update`` of S sites at once: from S×… gradients per term, S λ per term, each of its own site.

    Sites are those of one objective: fixed weights for all, or auto for all.
    """
    norms = {name: torch.linalg.vector_norm(gradient.flatten(1), dim=1) for name, gradient in gradients.items()}
    return weights_of_norms(sites, norms)


def weights_of_norms(sites: Sequence[TermWeights], norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As ``update_together``, from S norms per term."""
    lambdas = {}
    for name, norm in norms.items():
        scales = [one.strength * one.factor * one.site_share * one.shares[name] for one in sites]
        fixed = [one.fixed[name] for one in sites if one.fixed is not None]
        if fixed:
            lambdas[name] = numbers([a * b for a, b in zip(scales, fixed, strict=True)], norm)
            continue
        mean = _running_mean([one.norms.get(name) for one in sites], norm)
        references = []
        for one, own in zip(sites, mean, strict=True):
            assert one.reference is not None, "reference is measured before the first step"
            one.norms[name], one.reference = own, one.reference.to(norm)
            references.append(one.reference)
        ratio = numbers(scales, norm) * torch.stack(references) / mean
        lambdas[name] = torch.where(mean > 0, ratio, torch.zeros_like(ratio))
    return lambdas


def _running_mean(old: Sequence[Tensor | None], norm: Tensor) -> Tensor:
    """ḡ of each site, from its last one (None for none yet) and the norms of this step."""
    if all(value is None for value in old):
        return norm
    last = torch.stack([own if value is None else value.to(norm) for value, own in zip(old, norm, strict=True)])
    mean = TermWeights.DECAY * last + (1 - TermWeights.DECAY) * norm
    # A hinge that is satisfied has no gradient; averaging its zeros in would blow up the next nonzero one.
    return torch.where(norm > 0, mean, last)


def numbers(values: Sequence[float], like: Tensor) -> Tensor:
    """Plain numbers as a vector on the device and in the dtype of ``like``, without waiting for the device."""
    if all(value == values[0] for value in values):
        return like.new_full((len(values),), values[0])  # filled there, not copied
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)
