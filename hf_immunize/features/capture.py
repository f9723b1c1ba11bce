"""Capture what goes into named linear layers during one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_immunize.errors import CaptureError, ModelError
from hf_immunize.features.neighbours import first_tensor
from hf_immunize.features.rows import RowLayout, plain_layout

Names = Iterable[str] | Mapping[str, RowLayout | str | None]
"""Module names, or layouts by name; None and a bare name mean the plain layout."""


def base_prefix(model: nn.Module) -> str | None:
    """What names of modules inside a Hugging Face model's base model start with; None where it is not set apart."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(model, prefix) else None


class Captured:
    """What the hooks of ``capture_inputs`` caught, by module name."""

    def __init__(self, modules: Mapping[str, nn.Module], layouts: Mapping[str, RowLayout | None]):
        self._modules, self._layouts = modules, layouts
        self._caught: dict[str, Tensor | None] = {}
        self._images: dict[str, int | None] = {}
        self._twice: set[str] = set()
        self._count: int | None = None
        self.closed = False

    def _begin(self, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A forward of the whole model starts: images are the rows of ``pixel_values``, else of the first tensor."""
        pixels = named.get("pixel_values")
        pixels = pixels if isinstance(pixels, Tensor) else first_tensor(args, named)
        self._count = len(pixels) if pixels is not None and pixels.dim() else None

    def _catch(self, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        # A forward repeated by activation checkpointing happens in backward, after the context has closed.
        if self.closed:
            return
        if name in self._caught:
            self._twice.add(name)
            return
        self._caught[name] = first_tensor(args, named)
        self._images[name] = self._count

    def __getitem__(self, name: str) -> Tensor:
        """N×D features of module ``name``, one row per image.

        Raises:
            CaptureError: nothing, or two things, were caught, or an input that does not fit the layout and the number
                of images of the forward.
        """
        try:
            return self.layout(name).rows(self.raw(name), self.images(name))
        except CaptureError as error:
            raise CaptureError(f"'{name}': {error}") from error

    def raw(self, name: str) -> Tensor:
        """The input of module ``name`` as it was. Raises CaptureError when nothing, or two things, were caught."""
        if name in self._twice:
            raise CaptureError(
                f"expected one forward through '{name}' while capturing, got two or more: open a new capture_inputs "
                "context for each forward."
            )
        if name not in self._caught:
            raise CaptureError(
                f"expected a forward through '{name}' while capturing, got none: check that the model uses this layer "
                "and that it was not compiled before the capture."
            )
        value = self._caught[name]
        if value is None:
            raise CaptureError(
                f"expected a tensor among the inputs of '{name}' ({type(self._modules[name]).__name__}), got none: "
                "choose a layer inside it."
            )
        return value

    def __contains__(self, name: str) -> bool:
        """Whether a forward passed module ``name``."""
        return name in self._caught

    def images(self, name: str) -> int | None:
        """Images of the forward that passed module ``name``; None where a part of the model was called."""
        return self._images.get(name)

    def layout(self, name: str) -> RowLayout:
        """The layout that was given for module ``name``, else the plain one: images first."""
        return self._layouts[name] or plain_layout(self._modules[name], self.raw(name))

    def arrange(self, layouts: Mapping[str, RowLayout]) -> None:
        """Read what was caught with these layouts from now on."""
        self._layouts = {**self._layouts, **layouts}

    def shift(self, name: str, gradient: Tensor) -> Tensor:
        """N×D: from the gradient at the input of module ``name``, that of a shift of all that a row is the mean of."""
        return self.layout(name).shift(gradient, self.images(name))

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of module name and features."""
        return ((name, self[name]) for name in self._layouts)


def as_layouts(names: Names) -> dict[str, RowLayout | None]:
    """Layouts by name, None where none was given. Raises CaptureError for a pattern that is none."""
    told = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names)
    return {name: RowLayout(layout) if isinstance(layout, str) else layout for name, layout in told.items()}


@contextmanager
def capture_inputs(model: nn.Module, names: Names) -> Iterator[Captured]:
    """Capture the inputs of the named modules during exactly one forward inside the context.

    Gradients flow through what is captured.

    Args:
        names: module names, or layouts by name (see ``find_layouts``). Without one, images are taken to come first; a
            forward whose number of images is another one is refused.

    Raises:
        ModelError: a name the model does not have.
    """
    layouts = as_layouts(names)
    modules = dict(model.named_modules())
    unknown = [name for name in layouts if name not in modules]
    if unknown:
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        raise ModelError(
            f"expected module names of {type(model).__name__}, got {unknown}: its last linear layers are {linear[-5:]}."
        )
    caught = Captured(modules, layouts)

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args, named: caught._catch(name, args, named)

    handles = [model.register_forward_pre_hook(lambda _, args, named: caught._begin(args, named), with_kwargs=True)]
    handles += [modules[name].register_forward_pre_hook(hook(name), with_kwargs=True) for name in layouts]
    try:
        yield caught
    finally:
        caught.closed = True
        for handle in handles:
            handle.remove()
