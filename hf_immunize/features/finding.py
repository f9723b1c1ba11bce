"""Which axis of a layer's input holds the images: tried, not guessed.

One image of a small batch is replaced, and every entry of the input that changes belongs to it. A layout is accepted
only if, for each image in turn, what changes is in that image's row and nothing is in another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_immunize.errors import CaptureError
from hf_immunize.features.capture import Names, as_layouts, capture_inputs
from hf_immunize.features.neighbours import feature_axes
from hf_immunize.features.rows import RowLayout, candidates, declared_features, plain_layout

_BATCHES = (3, 2)
"""Two sizes without a common factor: what fits both by chance fits no other size by rule."""
_REPEATS = 4
"""What counts as changed, in units of how far a forward of the very same images differs. Other images' entries go
through the same kernels with the same shapes and keep their bits: only kernels that add in any order make this unit
other than zero."""

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Trial:
    """One input under one batch size: its value, and for each replaced image the entries that changed (D kept as 1)."""

    images: int
    feature_axis: int
    value: Tensor
    changed: Sequence[Tensor]

    @property
    def moves(self) -> bool:
        """Whether each image changes something."""
        return all(bool(changed.any()) for changed in self.changed)

    def fits(self, layout: RowLayout) -> bool:
        """Whether each image changes its own row and no other."""
        for image, changed in enumerate(self.changed):
            try:
                rows = layout.by_image(changed, self.images).flatten(1).any(dim=1)
            except CaptureError:
                return False
            if rows.nonzero().flatten().tolist() != [image]:
                return False
        return True


def find_layouts(
    model: nn.Module,
    names: Names,
    inputs: Batch,
    *,
    others: Batch | None = None,
    forward: Callable[[Batch], Any] | None = None,
) -> dict[str, RowLayout]:
    """How the inputs of the named modules become one row per image, tried on a real batch in evaluation mode.

    Features are the last axis of linear layers and the second one of convolutions; for blocks, the axis that the first
    layer with a type reads as such. Weights, modes and random states are left as they were.

    Args:
        names: module names, or layouts by name that are to be tried instead of found.
        inputs: what a forward needs, by name, one row per image (at least one, which is then repeated).
        others: replacements of the same shapes; by default ``inputs`` with noise on all that is floating point.
        forward: runs the model; by default on ``inputs`` as keywords.

    Raises:
        CaptureError: a module that no forward passes or two pass, or an input without one row per image, with the
            shape that was seen.
    """
    asked, modules = as_layouts(names), dict(model.named_modules())
    with _undisturbed(model) as place:
        run = forward or (lambda batch: model(**batch))
        ours, theirs = (_rows(part, max(_BATCHES), place) for part in (inputs, others or _noisy(inputs)))
        trials = _try(model, asked, run, ours, theirs)
        if not all(trial.moves for tried in trials.values() for trial in tried):
            with _awake(model, lambda: run(_replace(ours, theirs, [1]))) as changed:
                trials = _try(model, asked, run, ours, theirs) if changed else trials
        moved = any(trial.moves for tried in trials.values() for trial in tried)
        if not moved and _answers(run, ours) == _answers(run, theirs):
            return {name: asked[name] or _of_the_dead(name, modules[name], trials[name]) for name in asked}
    return {name: _choose(name, modules[name], asked[name], trials[name]) for name in asked}


@torch.no_grad()
def unmoved_inputs(model: nn.Module, names: Sequence[str], inputs: Batch) -> list[str]:
    """Those of the named modules whose input is the same for any images: learned queries, tables of positions."""
    with _undisturbed(model) as place:
        ours, theirs = (_rows(part, 2, place) for part in (inputs, _noisy(inputs)))

        def run(batch: Batch) -> Any:
            return model(**batch)

        def unmoved() -> list[str]:
            first, second = (_watch(model, names, run, batch) for batch in (ours, theirs))
            return [name for name in names if torch.equal(first[name], second[name])]

        found = unmoved()
        if found:
            with _awake(model, lambda: run(_replace(ours, theirs, [1]))) as changed:
                found = unmoved() if changed else found
    return found


def _try(
    model: nn.Module, asked: Mapping[str, RowLayout | None], run: Callable[[Batch], Any], ours: Batch, theirs: Batch
) -> dict[str, list[_Trial]]:
    """Every input under both batch sizes, each image replaced in turn."""
    trials: dict[str, list[_Trial]] = {name: [] for name in asked}
    axes: dict[str, int] = {}
    noise: dict[str, Tensor] = {}
    for count in _BATCHES:
        batch = {name: rows[:count] for name, rows in ours.items()}
        values = _watch(model, asked, run, batch)
        if not axes:
            axes = _feature_axes(model, asked, values, partial(run, batch))
            again = _watch(model, asked, run, batch)
            noise = {name: _noise(values[name], again[name], axes[name]) for name in asked}
        changed: dict[str, list[Tensor]] = {name: [] for name in asked}
        for image in range(count):
            for name, value in _watch(model, asked, run, _replace(batch, theirs, [image])).items():
                changed[name].append(_changes(values[name], value, noise[name], axes[name]))
        for name in asked:
            trials[name].append(_Trial(count, axes[name], values[name], changed[name]))
    return trials


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[torch.nn.Parameter]:
    """Evaluation mode, no gradients, random states that come back; yields a parameter for its device and dtype."""
    place = next(model.parameters())
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng([place.device] if place.device.type == "cuda" else []), torch.no_grad():
            yield place
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _awake(model: nn.Module, run: Callable[[], Any]) -> Iterator[bool]:
    """With the norm statistics of one batch: with those of its birth a deep network answers the same to every image.

    Yields False where there are none to change.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    kept = [{name: value.clone() for name, value in norm.named_buffers(recurse=False)} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    try:
        if norms:
            run()
        for norm in norms:
            norm.eval()
        yield bool(norms)
    finally:
        for norm, buffers, momentum in zip(norms, kept, momenta, strict=True):
            norm.momentum = momentum
            for name, value in buffers.items():
                norm.get_buffer(name).copy_(value)


def _rows(batch: Batch, count: int, like: Tensor) -> dict[str, Tensor]:
    """So many rows, from the first again where there are fewer, with the model's device and precision."""
    found = {}
    for name, value in batch.items():
        rows = value[torch.arange(count, device=value.device) % len(value)]
        found[name] = rows.to(like.device, like.dtype if value.is_floating_point() else None)
    return found


def _noisy(batch: Batch) -> dict[str, Tensor]:
    """Other rows: unit noise on all that is floating point."""
    noise = torch.Generator().manual_seed(0)
    return {
        name: value + torch.randn(value.shape, generator=noise).to(value) if value.is_floating_point() else value
        for name, value in batch.items()
    }


def _replace(batch: Batch, others: Batch, images: Sequence[int]) -> dict[str, Tensor]:
    found = {name: rows.clone() for name, rows in batch.items()}
    for name, rows in found.items():
        for image in images:
            rows[image] = others[name][image]
    return found


def _watch(model: nn.Module, names: Names, run: Callable[[Batch], Any], batch: Batch) -> dict[str, Tensor]:
    """Inputs of the named modules in a forward that draws the same random numbers every time."""
    torch.manual_seed(0)
    with capture_inputs(model, names) as caught:
        run(batch)
    return {name: caught.raw(name) for name in names}


def _changes(before: Tensor, after: Tensor, noise: Tensor, feature_axis: int) -> Tensor:
    """Which entries changed by more than ``noise`` (one number per feature), D kept as 1."""
    if before.shape != after.shape:
        return torch.ones_like(before.select(feature_axis, 0).unsqueeze(feature_axis), dtype=torch.bool)
    return ((after - before).abs() > noise).any(dim=feature_axis, keepdim=True)


def _noise(before: Tensor, again: Tensor, feature_axis: int) -> Tensor:
    """What counts as no change of each feature."""
    others = [axis for axis in range(before.dim()) if axis != feature_axis % before.dim()]
    moved = (again - before).abs() if before.shape == again.shape else torch.full_like(before, torch.inf)
    return _REPEATS * moved.amax(dim=others, keepdim=True)


def _feature_axes(
    model: nn.Module, asked: Mapping[str, RowLayout | None], values: Mapping[str, Tensor], run: Callable[[], Any]
) -> dict[str, int]:
    """The features' axis of every input: of the given layout, of the layer's type, or of what else meets the tensor."""
    modules = dict(model.named_modules())
    found, waiting = {}, []
    for name, layout in asked.items():
        value, declared = values[name], declared_features(modules[name])
        if not value.is_floating_point() or value.dim() < 2:
            raise _refusal(name, modules[name], value, "which is not a batch of features")
        if declared is not None and value.shape[declared[0]] != declared[1]:
            where = f"which has not its {declared[1]} features on axis {declared[0]}"
            raise _refusal(name, modules[name], value, where)
        if layout is not None:
            found[name] = layout.feature_axis
        elif declared is not None:
            found[name] = declared[0] % value.dim()
        else:
            waiting.append(name)
    met = feature_axes(model, waiting, run) if waiting else {}
    for name in waiting:
        if name not in met and values[name].dim() > 3:
            raise _refusal(name, modules[name], values[name], "in which no layer beside it shows the features' axis")
        found[name] = met.get(name, values[name].dim() - 1)
    return found


def _answers(run: Callable[[Batch], Any], batch: Batch) -> list[list[float]]:
    """Numbers of all tensors in what a forward returns."""
    torch.manual_seed(0)
    found = run(batch)
    values = found.values() if isinstance(found, Mapping) else found if isinstance(found, tuple | list) else [found]
    return [value.flatten().tolist() for value in values if isinstance(value, Tensor)]


def _of_the_dead(name: str, module: nn.Module, trials: Sequence[_Trial]) -> RowLayout:
    """Images first, where the shapes say so: a network that answers the same to everything shows no more than that."""
    for trial in trials:
        if trial.value.dim() != 2 or len(trial.value) != trial.images:
            raise _refusal(name, module, trial.value, "which not every image changes")
    return plain_layout(module, trials[0].value)


def _choose(name: str, module: nn.Module, given: RowLayout | None, trials: Sequence[_Trial]) -> RowLayout:
    """The only layout that every trial fits."""
    value, images, axis = trials[0].value, trials[0].images, trials[0].feature_axis
    if given is not None:
        given.rows(value, images)  # says so where the axes do not fit at all
        if (declared := declared_features(module)) and value.shape[axis] != declared[1]:
            raise _refusal(name, module, value, f"where '{given.pattern}' takes another axis for its features")
    if not bool(torch.isfinite(value).all()):  # a broken model: what it changes cannot be seen
        return given or plain_layout(module, value)
    ways = [given] if given is not None else list(candidates(value.shape, images, axis))
    fitting = [way for way in ways if all(trial.fits(way) for trial in trials)]
    if len(fitting) == 1:
        return fitting[0]
    if len(fitting) > 1:
        told = " or ".join(f"'{way.pattern}'" for way in fitting)
        raise _refusal(name, module, value, f"which could be {told}")
    if not all(trial.moves for trial in trials):
        raise _refusal(name, module, value, "which not every image changes")
    why = "no axis keeps the images apart" if given is None else f"'{given.pattern}' does not keep the images apart"
    raise _refusal(name, module, value, f"of which {why}")


def _refusal(name: str, module: nn.Module, value: Tensor, what: str) -> CaptureError:
    return CaptureError(
        f"expected one row of features per image at '{name}' ({type(module).__name__}), got an input of shape "
        f"{tuple(value.shape)} for {_BATCHES[0]} images, {what}: choose another layer, or name its axes, e.g. "
        f"site_layouts='{name}=(n k) t d'."
    )
