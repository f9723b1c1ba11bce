"""Find a model's head, and capture what goes into named linear layers during one forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_immunize.errors import CaptureError, ModelError


def base_prefix(model: nn.Module) -> str | None:
    """What names of modules inside a Hugging Face model's base model start with; None where it is not set apart."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(model, prefix) else None


def pool_rows(features: Tensor) -> Tensor:
    """One row per sample: tokens of an N×T×D input are averaged, trailing 1×1 positions of N×D×1×1 are dropped."""
    if features.dim() == 2:
        return features
    if features.dim() == 3:
        return features.mean(dim=1)
    if features.dim() == 4:
        return features.mean(dim=(2, 3))
    raise CaptureError(
        f"expected features of shape N x D, N x T x D or N x D x H x W, got {tuple(features.shape)}: choose a layer "
        "whose input has one of these shapes."
    )


class Captured:
    """What the hooks of ``capture_inputs`` caught, by module name."""

    def __init__(self, names: Iterable[str]):
        self._names = tuple(names)
        self._caught: dict[str, Tensor] = {}
        self._twice: set[str] = set()
        self.closed = False

    def _catch(self, name: str, value: Tensor) -> None:
        # A forward repeated by activation checkpointing happens in backward, after the context has closed.
        if self.closed:
            return
        if name in self._caught:
            self._twice.add(name)
        else:
            self._caught[name] = value

    def __getitem__(self, name: str) -> Tensor:
        """Pooled N×D input of module ``name``. Raises CaptureError when nothing, or two things, were caught."""
        return pool_rows(self.raw(name))

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
        return self._caught[name]

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of module name and pooled features."""
        return ((name, self[name]) for name in self._names)


@contextmanager
def capture_inputs(model: nn.Module, names: Iterable[str]) -> Iterator[Captured]:
    """Capture the inputs of the named modules during exactly one forward inside the context.

    Gradients flow through what is captured. Raises ModelError for a name the model does not have.
    """
    names = tuple(names)
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        raise ModelError(
            f"expected module names of {type(model).__name__}, got {unknown}: its last linear layers are {linear[-5:]}."
        )
    caught = Captured(names)

    def hook(name: str):
        # A module called with keywords only (Swin's decoders) gets its first one.
        return lambda _, args, named: caught._catch(name, args[0] if args else next(iter(named.values())))

    handles = [modules[name].register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    try:
        yield caught
    finally:
        caught.closed = True
        for handle in handles:
            handle.remove()


@torch.no_grad()
def extract_features(model: nn.Module, batches: Iterable[dict[str, Tensor]], names: Iterable[str]) -> dict[str, Tensor]:
    """Features at the named modules over whole batches in evaluation mode, concatenated on the CPU, N×D each.

    Batches hold ``pixel_values`` (other keys are ignored). The model's training mode is restored.

    Raises:
        CaptureError: no batch at all, or a hook that did not catch.
    """
    names = tuple(names)
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        for batch in batches:
            with capture_inputs(model, names) as caught:
                model(pixel_values=batch["pixel_values"].to(device))
            for name, features in caught.items():
                kept[name].append(features.cpu())
    finally:
        model.train(was_training)
    if not all(kept.values()):
        raise CaptureError("expected at least one batch to extract features from, got none: the dataset is empty.")
    return {name: torch.cat(parts) for name, parts in kept.items()}
