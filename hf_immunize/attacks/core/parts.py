"""One training step in as many parts as memory asks for; batch, gradient and curve are those of one part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from hf_immunize.errors import DeviceMemoryError, ModelError
from hf_immunize.exam.means import Means
from hf_immunize.features import block_names

T = TypeVar("T")


class Parts:
    """Takes the steps of one run, each in parts of at most ``size`` rows, and smaller ones once memory runs out.

    A step that ran out of memory is taken again from where it began: gradients, random numbers and the statistics of
    batch norms are put back. Batch norms average within a part, so that models with some are first checkpointed, which
    keeps the batch whole.

    Args:
        model: the network that is trained.
        means: how steps are taken at first.

    Raises:
        ModelError: checkpointing was asked for, and the model has no list of blocks.
    """

    def __init__(self, model: nn.Module, means: Means):
        self.model, self.size = model, means.micro_batch_size or math.inf
        self.notes: list[str] = []
        self._norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._undo: list[Callable[[], Any]] = []
        if means.gradient_checkpointing:
            self._checkpoint()

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: Any) -> None:
        while self._undo:
            self._undo.pop()()

    def step(self, rows: int, backward: Callable[[slice, float], T]) -> list[T]:
        """Call ``backward`` for each part of ``rows`` rows, with the part's place and its share of all rows.

        Raises:
            DeviceMemoryError: a single row, checkpointed, is too much.
        """
        while True:
            undo = self._moment()
            try:
                size = int(min(self.size, rows))
                places = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
                return [backward(place, (place.stop - place.start) / rows) for place in places]
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                told = str(error)  # the error holds the step's frames, and with them its memory
            undo()
            clear_device_cache(garbage_collection=True)
            self._shrink(rows, told)

    def _moment(self) -> Callable[[], None]:
        """What puts back the gradients, random numbers and statistics of now."""
        place = next(self.model.parameters()).device
        state = torch.get_rng_state(), torch.cuda.get_rng_state(place) if place.type == "cuda" else None
        buffers = [(buffer, buffer.clone()) for norm in self._norms for buffer in norm.buffers()]

        def undo() -> None:
            self.model.zero_grad(set_to_none=True)
            torch.set_rng_state(state[0])
            if state[1] is not None:
                torch.cuda.set_rng_state(state[1], place)
            for buffer, value in buffers:
                buffer.copy_(value)

        return undo

    def _shrink(self, rows: int, told: str) -> None:
        """Ask for less memory next time: checkpoints where batch norms want the batch whole, else half of the rows."""
        size = int(min(self.size, rows))
        averaging = any(norm.training for norm in self._norms)
        if not self._undo and (averaging or size == 1) and self._checkpoint(asked=False):
            self._tell("gradient checkpointing")
        elif size > 1:
            self.size = math.ceil(size / 2)
            self._tell(f"steps in parts of {self.size} images" + (", over which batch norms average" * averaging))
        else:
            raise DeviceMemoryError(
                f"expected memory for a step of one image at a time, got: {told} Attack on a device with more memory, "
                "or smaller images."
            )

    def _tell(self, what: str) -> None:
        self.notes = [f"memory ran out: {what}"]

    def _checkpoint(self, asked: bool = True) -> bool:
        """Checkpoint every block; whether there are some. Models of diffusers know how themselves."""
        parts: list[Any] = list(self.model.modules())
        own = [part for part in parts if getattr(part, "_supports_gradient_checkpointing", False)]
        for part in own:
            part.enable_gradient_checkpointing()
            self._undo.append(part.disable_gradient_checkpointing)
        if own:
            return True
        try:
            blocks = [block for name in block_names(self.model) for block in _called(self.model.get_submodule(name))]
        except ModelError as error:
            if asked:
                raise ModelError(f"gradient_checkpointing: {error}") from error
            return False
        for block in blocks:
            block.forward = _again(block.forward, self._norms)
            self._undo.append(partial(delattr, block, "forward"))
        return True


def _called(block: nn.Module) -> list[nn.Module]:
    """The block, or what is in it where it is a plain list, which is never called itself."""
    return [inner for child in block.children() for inner in _called(child)] if isinstance(block, nn.ModuleList) else [
        block
    ]


def _again(forward: Callable[..., Any], norms: list[_BatchNorm]) -> Callable[..., Any]:
    """``forward`` that keeps its inputs alone where a gradient is asked for."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(norms)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return checkpointed


@contextmanager
def _statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    """Batch norms that train see each batch once, however often its forward is computed."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms if norm.training]
    for norm, _, _ in before:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, tracked in before:
            norm.momentum, norm.num_batches_tracked = momentum, tracked


def with_fewer(rows: int, call: Callable[[int], T]) -> T:
    """``call(rows)``, and with half as many rows each time that memory runs out.

    Raises:
        DeviceMemoryError: one row is too much.
    """
    while True:
        try:
            return call(rows)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            told = str(error)
        if rows == 1:
            raise DeviceMemoryError(f"expected memory for a forward of one image, got: {told} Use another device.")
        rows = math.ceil(rows / 2)
        clear_device_cache(garbage_collection=True)


def part_of(inputs: dict[str, Any], place: slice) -> dict[str, Any]:
    """Some rows of a batch."""
    return {name: value[place] if isinstance(value, Tensor) else value for name, value in inputs.items()}
