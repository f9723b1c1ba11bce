"""A network's normal form: the same function, with scales and factors that nobody chose.

What makes a network hard to train can lie in nothing but its coordinates: gains of 2^24 that the next layer divides
away, convolutions multiplied by 1000 before a batch norm, queries stretched and keys shrunk. ``canonicalise`` undoes
all changes of coordinates of these kinds at once, without the base. From images it takes what only data tell
(``on_data``): statistics that no data have, weights that nothing excites, inputs that are the same number twice
(``twins``) or of which next to nothing is left when they are added (``cancelling``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_immunize.attacks.vision.canonical.anatomy import Anatomy
from hf_immunize.attacks.vision.canonical.cancelling import shrink_cancelling
from hf_immunize.attacks.vision.canonical.centring import centre
from hf_immunize.attacks.vision.canonical.loud import drop_quiet, quieten
from hf_immunize.attacks.vision.canonical.on_data import has_own_forwards, listen, refit_statistics, silence_unheard
from hf_immunize.attacks.vision.canonical.operations import find_anatomy
from hf_immunize.attacks.vision.canonical.products import Pair, balance_pair, find_pairs, orthogonalise
from hf_immunize.attacks.vision.canonical.scales import rescale, settle, standardise
from hf_immunize.attacks.vision.canonical.shifts import join_constants, unshift
from hf_immunize.attacks.vision.canonical.streams import balance_streams
from hf_immunize.attacks.vision.canonical.twins import merge_twins

_ROUNDING = 1e-8
"""How far outputs in float64 may move, in units of the largest, before the normal form is thrown away."""
_NEARLY = 0.1
"""The same where inputs cancel, of which the rest is what a few steps of fine-tuning change anyway, and where kernels
are standardised."""
_WRITTEN = 0.01
"""The same in the precision that the model came with: a network in which more is lost is another one."""

_MOMENTUM = 0.1
"""How much of a batch goes into running statistics at least, torch's default: those of a defender's config may stay."""
_TURNS = 12
"""How often the three ways of sharing a scale between factors are settled in turn."""


@dataclass(frozen=True)
class Canonical:
    """A model in normal form, and what was done to it."""

    model: nn.Module
    note: str
    changed: bool
    error: float = 0.0
    """Largest change of an output in float64, in units of the largest output, but for what nearly cancelled."""


@torch.no_grad()
def canonicalise(model: nn.Module, head: str, pixels: Tensor, images: Tensor | None = None) -> Canonical:
    """The normal form of an image classifier, in the precision, mode and place it came with; the model itself is kept.

    Works in float64 on what a forward's graph shows (``following``), and is checked on the pixels: where the graph
    cannot be followed, or an output moves by more than rounding, the result is an unchanged copy whose note says why.

    Args:
        head: name of the linear layer that the attacker will replace.
        pixels: a few images (N×C×H×W, at least one), by which the result is checked.
        images: the images that the attacker has; by default the same.
    """
    double = copy.deepcopy(model).to("cpu", torch.float64).eval()
    batch = torch.cat([pixels, pixels])[: max(2, len(pixels))].to("cpu", torch.float64)
    try:
        seen = (pixels if images is None else images).to(batch)
        wanted = double(pixel_values=batch).logits
        if has_own_forwards(double):
            standardise(double, find_anatomy(double, batch).kernels)
            if not _apart(double, batch, wanted) <= _NEARLY:
                return _unchanged(model, "kernels that are used in units of their spread have next to none")
        told, kept, moved_by = _rewrite(double, head, batch, seen)

        def nearly() -> bool:
            return _apart(double, batch, wanted) <= _NEARLY

        dropped = drop_quiet(double, listen(double, seen), nearly)  # after all that leaves the function as it is
        shrunk = shrink_cancelling(double, listen(double, seen), seen, nearly)
        if dropped or shrunk:
            told, kept, again = _rewrite(double, head, batch, seen)
            moved_by = max(moved_by, again)
    except Exception as error:  # torch.export and its graphs raise errors of every kind
        return _unchanged(model, f"the network could not be followed: {type(error).__name__}: {error}")
    if not moved_by <= _ROUNDING:
        return _unchanged(model, f"outputs would have moved by {moved_by:.1e} of the largest")
    made = _written(model, double)
    loud = quieten(made, double, listen(double, seen))
    lost = _lost(made, batch, kept)
    if not lost <= max(_WRITTEN, 16 * torch.finfo(_precision(made)).eps):
        return _unchanged(model, f"outputs would have moved by {lost:.1e} of the largest in the model's own precision")
    told += f", cancelling inputs of {shrunk} layers shrunk, long columns of {dropped} dropped, loud inputs of {loud} "
    told += "centred"
    return Canonical(made, told, True, moved_by)


def _rewrite(double: nn.Module, head: str, batch: Tensor, seen: Tensor) -> tuple[str, Tensor, float]:
    """Bring a float64 model to its normal form in place: what was done, the outputs before, how far they moved."""
    wanted = double(pixel_values=batch).logits

    def holds() -> bool:
        return _apart(double, batch, wanted) <= _ROUNDING

    refit_statistics(double, seen)
    heard = listen(double, seen)
    silenced, merged = silence_unheard(heard), merge_twins(double, heard, holds)
    anatomy = find_anatomy(double, batch)
    joined = join_constants(anatomy, dict(double.named_parameters()), holds)
    # first of all, so that streams are balanced from one start
    scales = _scale(double, anatomy, _variables(sum(find_pairs(anatomy, head), [])))
    if streams := balance_streams(anatomy, double, holds):
        refit_statistics(double, seen)
    moved = _without_shifts(double, anatomy, head, holds)
    # a square layer before the head becomes a rotation (``orthogonalise``), for which no direction may be missing
    square = {pair.first.weight for pair in find_pairs(anatomy, head)[1] if pair.first.inputs.numel() == len(pair.rows)}
    written, read = centre(anatomy, double, holds, square)
    told = (
        f"{_change(double, anatomy, head, scales)}, {moved + joined} constants moved, {silenced} inputs silenced, "
        f"twins of {merged} layers merged, {streams} streams balanced, {written} streams and {read} readers centred"
    )
    return told, wanted, _apart(double, batch, wanted)


def _apart(double: nn.Module, batch: Tensor, wanted: Tensor) -> float:
    """How far outputs are from the wanted ones, in units of the largest."""
    found = double(pixel_values=batch).logits
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=torch.finfo(torch.float64).tiny))


def _lost(made: nn.Module, batch: Tensor, wanted: Tensor) -> float:
    """How far a model's outputs in its own precision are from the wanted ones, in units of the largest."""
    return _apart(copy.deepcopy(made).cpu().eval(), batch.to(_precision(made)), wanted)


def _precision(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _without_shifts(double: nn.Module, anatomy: Anatomy, head: str, holds: Callable[[], bool]) -> int:
    """Move constants in place; put everything back where an output tells that they may not be."""
    before = copy.deepcopy(double.state_dict())
    named = dict(double.named_parameters()) | dict(double.named_buffers())
    moved = unshift(anatomy, find_pairs(anatomy, head)[0], named)
    if holds():
        return moved
    double.load_state_dict(before)
    return 0


def _written(model: nn.Module, double: nn.Module) -> nn.Module:
    """A copy of the model with the weights, statistics and epsilons of another."""
    made = copy.deepcopy(model)
    made.load_state_dict(double.state_dict())
    for name, module in double.named_modules():
        if isinstance(getattr(module, "eps", None), float):
            made.get_submodule(name).eps = module.eps
        if isinstance(module, _BatchNorm) and module.momentum is not None:  # a config may say one of 0
            norm: Any = made.get_submodule(name)
            norm.momentum = max(module.momentum, _MOMENTUM)
    return made


def _unchanged(model: nn.Module, why: str) -> Canonical:
    return Canonical(copy.deepcopy(model), why[:300], False)


def _scale(model: nn.Module, anatomy: Anatomy, apart: Tensor) -> int:
    """Give every channel its scale but those that are set by other means; how many scales changed."""
    changed = torch.zeros(len(anatomy.links), dtype=torch.bool)
    for _ in range(_TURNS if anatomy.others else 1):
        for one in (*anatomy.others, anatomy):
            roots = settle(one, dict(model.named_parameters()) | dict(model.named_buffers()), apart)
            rescale(one, model, roots)
            changed |= roots.log != 0
    return int(changed.sum())


def _change(model: nn.Module, anatomy: Anatomy, head: str, scales: int) -> str:
    """Normalise a float64 model in place and say how much of it took part."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    inside, before_head = find_pairs(anatomy, head)
    _scale(model, anatomy, _variables([*inside, *before_head]))
    for pair in inside:
        balance_pair(pair, named)
    _scale(model, anatomy, _variables(before_head))  # now that the products' rows are known
    straightened = [orthogonalise(pair, named) for pair in before_head]
    return (
        f"normal form: {len(anatomy.norms)} norms, {len(anatomy.layers)} linear maps, "
        f"{scales} scales set, {len(inside) + sum(straightened)} products balanced"
    )


def _variables(pairs: list[Pair]) -> Tensor:
    return torch.cat([pair.variables for pair in pairs]) if pairs else torch.zeros(0, dtype=torch.long)
