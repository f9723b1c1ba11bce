"""Where the frozen part of a network ends, and how to run only what comes after.

Nothing here knows an architecture. One forward is watched; the first trainable module in *execution* order is looked
up; and the innermost module around it whose input determines the rest of the forward is the boundary. That is not
assumed but tried: the modules that run before are replaced by ones that answer NaN, and the outputs must not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_immunize.errors import ModelError
from hf_immunize.features.template import Template, batch_tensors, fill, template_of

_ROWS = (3, 2)
"""Batch sizes of the two traces: sizes that scale with them are the batch's."""


class _Reached(Exception):
    """Raised at the boundary to skip the rest of a forward."""


@dataclass(frozen=True)
class Boundary:
    """The input of module ``name`` determines all that is computed after the ``skipped`` modules."""

    name: str
    skipped: tuple[str, ...]
    """Outermost modules that finish before the boundary is entered, once per call."""
    image: torch.Size
    """Shape of one image."""
    inputs: Template
    outputs: dict[str, list[Template]]
    """What each call of a skipped module returned."""

    @torch.no_grad()
    def rows(self, model: nn.Module, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Activations at the boundary, one row per image each; the rest of the network does not run.

        The modules before the boundary run in the mode they are in; call ``model.eval()`` first.
        """
        kept: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.extend(batch_tensors(self.inputs, (args, kwargs)))
            raise _Reached

        handle = model.get_submodule(self.name).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            model(pixel_values=pixel_values)
        except _Reached:
            if isinstance(model, FSDPModule):
                model.reset_iter_state()  # its parts wait for the end of a forward that has none
            return tuple(kept)
        finally:
            handle.remove()
        raise ModelError(f"expected a forward through '{self.name}', got none: trace the boundary again.")

    def placeholder(self, rows: int, like: Tensor) -> Tensor:
        """Pixels of the right shape that nothing reads."""
        return like.new_zeros(()).expand(rows, *self.image)

    @contextmanager
    def replay(self, model: nn.Module, rows: tuple[Tensor, ...], *, blank: float = 0.0) -> Iterator[Tensor]:
        """Inside, one forward of ``model`` starts at the boundary with ``rows``; yields the pixels to call it with.

        Activation checkpointing repeats a forward after this context has closed and cannot be combined with it.
        """
        count, calls = len(rows[0]), {name: iter(found) for name, found in self.outputs.items()}
        before = {"open": True}
        originals: dict[str, Any] = {}

        def stub(name: str, original: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if not before["open"]:
                    return original(*args, **kwargs)
                return fill(next(calls[name]), count, rows[0].device, blank=blank)

            return forward

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            before["open"] = False
            return fill(self.inputs, count, rows[0].device, rows=iter(rows))

        handle = model.get_submodule(self.name).register_forward_pre_hook(enter, with_kwargs=True)
        for name in self.skipped:
            module = model.get_submodule(name)
            originals[name] = module.__dict__.get("forward")
            module.forward = stub(name, module.forward)
        try:
            yield self.placeholder(count, rows[0])
        finally:
            handle.remove()
            for name, original in originals.items():
                module = model.get_submodule(name)
                if original is None:
                    del module.forward
                else:
                    module.forward = original


def find_boundary(model: nn.Module, image: torch.Size, *, dtype: torch.dtype = torch.float32) -> Boundary | None:
    """The innermost point from which the trainable part of ``model`` runs alone; None if no parameter precedes it.

    Args:
        model: with ``requires_grad`` set as it will be trained.
        image: shape of one image, C×H×W.
        dtype: of the pixels.

    Raises:
        ModelError: nothing is trainable, or a trainable parameter is never used in a forward.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(rows, *image, generator=generator).to(device, dtype) for rows in (*_ROWS, 4)]
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            events = _watch(model, batches[0])
            for candidate in _candidates(model, events):
                skipped = _finished_before(events, candidate)
                weights = sum(p.numel() for name in set(skipped) for p in model.get_submodule(name).parameters())
                if weights and (found := _try(model, candidate, tuple(skipped), image, batches)):
                    return found
    finally:
        model.train(was_training)
    return None


def _watch(model: nn.Module, pixels: Tensor) -> list[tuple[bool, str]]:
    """(entered?, module name) of every module call of one forward, in order; the model itself is left out."""
    events: list[tuple[bool, str]] = []
    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: events.append((True, name))))
            handles.append(module.register_forward_hook(lambda *_, name=name: events.append((False, name))))
    try:
        model(pixel_values=pixels)
    finally:
        for handle in handles:
            handle.remove()
    return events


def _candidates(model: nn.Module, events: list[tuple[bool, str]]) -> list[str]:
    """The calls around the first use of a trainable parameter, innermost first."""
    called = {name for entered, name in events if entered}
    owner = {}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            # A layer that is never called (out_proj of nn.MultiheadAttention) belongs to the module that reads it.
            name = path.rpartition(".")[0]
            while name and name not in called:
                name = name.rpartition(".")[0]
            owner[path] = name
    if not owner:
        raise ModelError("expected trainable parameters, got none: check trainable_modules.")
    owners = set(owner.values())
    if "" in owners:
        return []
    stack: list[str] = []
    for entered, name in events:
        if not entered:
            stack.pop()
            continue
        stack.append(name)
        if name in owners:
            return stack[::-1]
    return []


def _finished_before(events: list[tuple[bool, str]], candidate: str) -> list[str]:
    """Outermost calls that ended before ``candidate`` was entered, in order."""
    place = events.index((True, candidate))
    inside = []
    for entered, name in events[:place]:
        if entered:
            inside.append(name)
        else:
            inside.pop()
    finished, stack = [], []
    for entered, name in events[:place]:
        if entered:
            stack.append(name)
        else:
            stack.pop()
            if stack == inside[: len(stack)]:
                finished.append(name)
    return finished


def _record(model: nn.Module, candidate: str, skipped: tuple[str, ...], pixels: Tensor) -> tuple[Any, list[Any]]:
    """Inputs of the candidate and outputs of every skipped call, in order, of one forward."""
    outputs: list[Any] = []
    inputs: list[Any] = []

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        if not inputs:
            outputs.append(output)

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append((args, kwargs))

    handles = [model.get_submodule(name).register_forward_hook(leave) for name in set(skipped)]
    handles.append(model.get_submodule(candidate).register_forward_pre_hook(enter, with_kwargs=True))
    try:
        model(pixel_values=pixels)
    finally:
        for handle in handles:
            handle.remove()
    if len(inputs) != 1:
        raise ValueError("called more than once")
    return inputs[0], outputs


def _try(
    model: nn.Module, candidate: str, skipped: tuple[str, ...], image: torch.Size, batches: list[Tensor]
) -> Boundary | None:
    """The boundary at ``candidate`` if a forward that starts there gives the outputs of a whole one, else None."""
    try:
        (first, first_outputs), (second, second_outputs) = (
            _record(model, candidate, skipped, pixels) for pixels in batches[:2]
        )
        inputs = template_of(first, second, _ROWS)
        outputs: dict[str, list[Template]] = {name: [] for name in skipped}
        for name, one, two in zip(skipped, first_outputs, second_outputs, strict=True):
            outputs[name].append(template_of(one, two, _ROWS, strict=False))
        found = Boundary(candidate, tuple(dict.fromkeys(skipped)), image, inputs, outputs)
        rows = found.rows(model, batches[2])
        if not rows:
            return None
        with found.replay(model, rows, blank=float("nan")) as pixels:
            ours = _tensors(model(pixel_values=pixels))
        truth = _tensors(model(pixel_values=batches[2]))
    except (ValueError, TypeError, RuntimeError, StopIteration, IndexError):
        return None  # a module that cannot be entered like that: the next one out may be
    same = len(ours) == len(truth) and all(
        a.shape == b.shape and bool(torch.isfinite(a).all()) and torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(ours, truth, strict=True)
    )
    return found if same else None


def _tensors(output: Any) -> list[Tensor]:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else [output]
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
