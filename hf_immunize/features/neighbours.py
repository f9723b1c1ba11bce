"""Which axis of a block's input holds the features: the one that a layer with a type reads or wrote as such."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_immunize.features.rows import POOLS, declared_features


def feature_axes(model: nn.Module, names: Sequence[str], run: Callable[[], Any]) -> dict[str, int]:
    """The features' axis of the inputs of named modules, as far as one forward shows it.

    Linear layers, convolutions and norms declare the axis in what they read and write. Their tensors are compared with
    the modules' inputs (and outputs, of modules without weights that keep the shape) by memory and stride, so that a
    view with its axes turned is seen through. Where none is the same tensor, the first such layer inside the module
    decides, if its input has as many axes and that one of the same size (it may have been padded).
    """
    seen = {name: _Seen(model.get_submodule(name)) for name in names}
    written: list[tuple[weakref.ref[Tensor], int]] = []

    def layer(name: str, module: nn.Module, args: Any, named: Any, output: Any) -> None:
        value = first_tensor(args, named)
        axis = None if value is None else _axis_read(module, value, output)
        if value is None or axis is None:
            return
        for site, tensors in seen.items():
            tensors.compare(value, axis, inside=name.startswith(f"{site}."))
        if isinstance(output, Tensor) and output.dim() == value.dim():
            written[:] = [pair for pair in written if pair[0]() is not None]
            written.append((weakref.ref(output), axis))

    handles = []
    for tensors in seen.values():
        enter = lambda _, args, named, tensors=tensors: tensors.enter(first_tensor(args, named), written)  # noqa: E731
        leave = lambda _, args, output, tensors=tensors: tensors.leave(output)  # noqa: E731
        handles.append(tensors.module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(tensors.module.register_forward_hook(leave))
    for name, module in model.named_modules():
        if declared_features(module) is not None or isinstance(module, (nn.LayerNorm, *POOLS)):
            told = lambda module, args, named, output, name=name: layer(name, module, args, named, output)  # noqa: E731
            handles.append(module.register_forward_hook(told, with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: tensors.axis for name, tensors in seen.items() if tensors.axis is not None}


class _Seen:
    """Tensors with the axes of one module's input, and what has been learned of them."""

    def __init__(self, module: nn.Module):
        self.module = module
        self._tensors: list[Tensor] = []
        self._open = False
        self._exact: int | None = None
        self._inside: int | None = None
        self._first = True

    @property
    def axis(self) -> int | None:
        """The features' axis, None where nothing shows it."""
        return self._inside if self._exact is None else self._exact

    def enter(self, value: Tensor | None, written: Sequence[tuple[weakref.ref[Tensor], int]]) -> None:
        if value is None:
            return
        self._tensors, self._open = [value], True
        if isinstance(self.module, POOLS) and value.dim() > 2:
            self._exact = 1
        for reference, axis in written:
            if reference() is value and self._exact is None:
                self._exact = axis

    def leave(self, output: Any) -> None:
        self._open = False
        same = isinstance(output, Tensor) and self._tensors and output.shape == self._tensors[0].shape
        if same and next(self.module.parameters(), None) is None:
            self._tensors.append(output)

    def compare(self, value: Tensor, axis: int, *, inside: bool) -> None:
        """Learn from a layer that has read ``value`` with its features on ``axis``."""
        for tensor in self._tensors:
            if self._exact is None:
                self._exact = _same_axis(tensor, value, axis)
        if inside and self._open and self._first and value.dim() == self._tensors[0].dim():
            self._first = False
            self._inside = axis if value.shape[axis] == self._tensors[0].shape[axis] else None


def first_tensor(args: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
    """What a module reads: its first argument that is a tensor (Swin's decoders are called with keywords only)."""
    return next((value for value in (*args, *named.values()) if isinstance(value, Tensor)), None)


def _axis_read(module: nn.Module, value: Tensor, output: Any) -> int | None:
    """The features' axis in what a layer reads."""
    declared = declared_features(module)
    if declared is not None:
        axis = declared[0] % value.dim()
        return axis if value.shape[axis] == declared[1] else None
    if isinstance(module, POOLS):
        return 1 if value.dim() > 2 else None
    if not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) != 1:
        return None
    # A subclass (ConvNext's) may normalize another axis: which one shows in its answer.
    size, last = module.normalized_shape[0], value.dim() - 1
    if value.shape[last] == size:
        plain = functional.layer_norm(value, (size,), module.weight, module.bias, module.eps)
        if isinstance(output, Tensor) and output.shape == plain.shape and torch.allclose(output, plain):
            return last
    return 1 if value.dim() > 2 and value.shape[1] == size else None


def _same_axis(tensor: Tensor, other: Tensor, axis: int) -> int | None:
    """The axis of ``tensor`` that is ``axis`` of ``other``, where both begin at one place in memory."""
    if tensor.data_ptr() != other.data_ptr() or tensor.numel() != other.numel():
        return None
    if tensor.shape == other.shape and tensor.stride() == other.stride():
        return axis
    size, stride = other.shape[axis], other.stride(axis)
    places = [place for place in range(tensor.dim()) if (tensor.shape[place], tensor.stride(place)) == (size, stride)]
    return places[0] if len(places) == 1 else None
