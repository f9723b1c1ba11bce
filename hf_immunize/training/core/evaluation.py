"""Values of terms and their gradients at detached features: of one site, or of a stack of sites at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_immunize.linalg import to_double
from hf_immunize.training.core.measured import Rows, Side, Term, TermSettings

Memory = dict[str, dict[str, Tensor]]
"""Per term, tensors it keeps between calls."""


@dataclass
class Evaluated:
    """Values of all terms on one global batch and their gradients at the features."""

    values: dict[str, Tensor]
    """Per term, zero-dimensional; S values of a stack of S sites."""
    gradients: dict[str, Tensor]
    """Per term, d value / d features of its side, N×D (or S×N×D) float64 of the global batch."""
    rows: Mapping[Side, Rows]
    """What was measured: the batch, then rows of earlier steps."""


def evaluate_terms(
    terms: tuple[Term, ...],
    rows: Mapping[Side, Rows],
    settings: TermSettings,
    *,
    past: Mapping[Side, Rows] | None = None,
    memory: Memory | None = None,
) -> Evaluated:
    """Measure every term and its gradient at detached features of the global batch.

    Working on detached features keeps the graph of a d×d spectrum away from the model's, lets one set of features
    gathered from several ranks and micro-batches serve every term, and makes the gradient norm of each term known
    before anything is propagated.

    Args:
        past: rows of earlier steps that are measured together with the batch, without gradient.
        memory: per term, tensors it keeps between calls; changed in place.
    """
    return _evaluate(terms, rows, settings, past or {}, [{} if memory is None else memory])


def evaluate_stack(
    terms: tuple[Term, ...],
    rows: Mapping[Side, Rows],
    settings: TermSettings,
    *,
    past: Mapping[Side, Rows] | None = None,
    memories: Sequence[Memory],
) -> Evaluated:
    """``evaluate_terms`` of S sites at once, their features stacked: S×N×D on each side, over the same labels.

    Every site's values and gradients are those it has alone, up to rounding. One backward serves all sites of a term:
    no value depends on another site's features, so the gradient of their sum is each one's own.

    Args:
        past: as for one site, stacked.
        memories: one per site.
    """
    return _evaluate(terms, rows, settings, past or {}, memories)


def _evaluate(
    terms: tuple[Term, ...], rows: Mapping[Side, Rows], settings: TermSettings, past: Mapping[Side, Rows],
    memories: Sequence[Memory],
) -> Evaluated:
    leaves = {side: to_double(part.features.detach()).requires_grad_() for side, part in rows.items()}
    measured = {side: _joined(leaves[side], part, past.get(side)) for side, part in rows.items()}
    values, gradients = {}, {}
    with torch.enable_grad():
        for term in terms:
            leaf = leaves[term.side]
            kept = [memory.setdefault(term.name, {}) for memory in memories]
            value = _value(term, measured[term.side], settings, kept)
            # retain: terms of one side share its spectrum; allow_unused: relu(A_t) may be constant.
            (gradient,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True, allow_unused=True)
            values[term.name] = value.detach()
            gradients[term.name] = torch.zeros_like(leaf) if gradient is None else gradient
    return Evaluated(values, gradients, measured)


def _joined(leaf: Tensor, part: Rows, past: Rows | None) -> Rows:
    if past is None or past.features.shape[-2] == 0:
        return Rows(leaf, part.labels, part.feature_dtype)
    with torch.enable_grad():
        features = torch.cat([leaf, past.features.to(leaf)], dim=-2)
    return Rows(features, torch.cat([part.labels, past.labels.to(part.labels)]), part.feature_dtype)


def _value(term: Term, rows: Rows, settings: TermSettings, memories: Sequence[dict[str, Tensor]]) -> Tensor:
    """The term of one matrix, or of each site of a stack; memories are changed in place."""
    if rows.features.dim() == 2:
        return _of_one(term, rows, settings, memories[0])
    together = _stacked(memories)
    if not term.stacked or together is None:
        pairs = zip(rows.sites, memories, strict=True)
        return torch.stack([_of_one(term, site, settings, memory) for site, memory in pairs])
    rows.memory = together
    value = term.measure(rows, settings)
    for place, memory in enumerate(memories):
        memory |= {name: kept[place] for name, kept in rows.memory.items()}
    return value


def _of_one(term: Term, rows: Rows, settings: TermSettings, memory: dict[str, Tensor]) -> Tensor:
    rows.memory = memory
    return term.measure(rows, settings)


def _stacked(memories: Sequence[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """Memories of several sites as one; None where they do not fit together, as when some sites have none yet."""
    first = memories[0]
    shapes = [{name: value.shape for name, value in memory.items()} for memory in memories]
    if any(shape != shapes[0] for shape in shapes[1:]):
        return None
    return {name: torch.stack([memory[name] for memory in memories]) for name in first}
