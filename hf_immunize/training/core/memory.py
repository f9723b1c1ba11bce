"""What a run holds in memory, from a model on the meta device and options alone: nothing is allocated.

    resident  = weights + moments + teacher + average
    peak      = resident + max(activations, gradients + left)              one micro-batch a step
    peak      = resident + gradients + max(activations, waiting + left)    several: gradients wait for the next forward
    peak     ≥ resident + gradients + what the optimizer makes for a moment

Where both tasks are sent through the model and share one backward, autograd is done with the harmful rows first: then
each weight's share of the gradient waits for the primary rows' (``waiting``), whose activations are all ``left``. FSDP2
adds shares up block by block and none waits.

Activations are the tensors that autograd keeps: a forward on fake tensors is watched, with attention as a fused kernel
keeps it (queries, keys, values, the answer and one number a row). DDP holds gradients twice (its buckets). FSDP2 shards
all of ``resident`` and the gradients over devices, and gathers two blocks at a time. The guard's copies lie on the
host.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

_MOMENTS = {
    "adamw_torch": 8.0, "adamw_torch_fused": 8.0, "sgd": 0.0, "adagrad": 4.0, "rmsprop": 4.0, "lion_32bit": 4.0,
    "ademamix": 12.0, "paged_adamw_32bit": 0.0, "schedule_free_adamw": 8.0, "adamw_torch_8bit": 2.03,
    "adamw_bnb_8bit": 2.03, "adamw_8bit": 2.03, "paged_adamw_8bit": 0.0, "lion_8bit": 1.02, "adamw_torch_4bit": 1.06,
}  # fmt: skip
"""Bytes a trained parameter that an optimizer keeps; quantized ones with a float32 for every 256 or 128 numbers, paged
ones on the host."""
_BLOCK_NAMES = r"(Layer|Block|Stage)"


@dataclass(frozen=True)
class Activations:
    """Bytes that one forward keeps for backward.

    Attributes:
        outside: what is kept outside of every block.
        blocks: what each block keeps.
        inputs: what each block is given: all that is kept of it under activation checkpointing.
    """

    outside: int
    blocks: tuple[int, ...]
    inputs: tuple[int, ...]

    def bytes(self, checkpointing: bool = False) -> int:
        """All of it; with checkpointing, the blocks' inputs and one block while it is run again."""
        if not checkpointing or not self.blocks:
            return self.outside + sum(self.blocks)
        return self.outside + sum(self.inputs) + max(self.blocks)


@dataclass(frozen=True)
class Options:
    """What decides memory beside the model.

    Attributes:
        optim: as TrainingArguments name it.
        teacher, average, guard: distillation, ``ema_decay``, a guarded drop.
        accumulation: micro-batches a step.
        checkpointing: activation checkpointing.
        devices, sharded: several devices with DDP, or with FSDP2.
        primary: share of a micro-batch's activations that is the primary task's; 1 where no other is sent through.
        attacker: a simulated attacker of a denoiser: "all" trains a copy of every weight, "lora" has factors beside.
        foreach: whether torch's AdamW works on all tensors at once, as it does on a GPU unless it is fused.
    """

    optim: str = "adamw_torch_fused"
    teacher: bool = False
    average: bool = False
    guard: bool = False
    accumulation: int = 1
    checkpointing: bool = False
    attacker: str | None = None
    devices: int = 1
    sharded: bool = False
    foreach: bool = True
    primary: float = 1.0


@dataclass(frozen=True)
class Memory:
    """Bytes on one device by purpose, and on its host.

    The host holds the guard's two copies (the start and the best weights), and for a moment a third when better ones
    are taken, and what the average stands in for while it is judged.
    """

    weights: float
    moments: float
    teacher: float
    average: float
    attacker: float
    gradients: float
    activations: float
    gathered: float
    momentary: float
    host: float
    host_momentary: float
    together: bool
    waiting: float
    left: float

    @property
    def resident(self) -> float:
        """What is there all the time."""
        return self.weights + self.moments + self.teacher + self.average + self.attacker

    @property
    def peak(self) -> float:
        """The largest sum at any moment of a step."""
        if self.together:
            both = self.gradients + max(self.activations, self.waiting + self.left)
        else:
            both = max(self.activations, self.gradients + self.left)
        return self.resident + self.gathered + max(both, self.gradients + self.momentary)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of distinct tensors."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that ask for a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def moment_bytes(parameters: Iterable[nn.Parameter], optim: str) -> float:
    """What an optimizer keeps on the device. Raises KeyError for one that is not in the table.

    Adafactor keeps a row and a column in the place of a matrix. 8-bit optimizers keep 32 bits below 4096 numbers.
    """
    if optim == "adafactor":
        return sum(4.0 * _factored(parameter.shape) for parameter in parameters)
    each, small = _MOMENTS[optim], 4.0 if optim.startswith("lion") else 8.0
    quantized = "bit" in optim and "32bit" not in optim and "paged" not in optim
    return sum(p.numel() * (small if quantized and p.numel() < 4096 else each) for p in parameters)


def _factored(shape: torch.Size) -> int:
    """Numbers that Adafactor keeps of a tensor: its two last dimensions apart."""
    if len(shape) < 2:
        return shape.numel()
    lead = shape[:-2].numel()
    return lead * (shape[-2] + shape[-1])


def memory_of(model: nn.Module, activations: int, options: Options, compute: torch.dtype = torch.float32) -> Memory:
    """Bytes of a run of ``model``, whose ``requires_grad`` flags say what is trained.

    Args:
        model: on any device, ``meta`` at best.
        activations: of all forwards of one micro-batch, see ``Activations.bytes``.
        options: see there.
        compute: what FSDP2 gathers parameters in.
    """
    mine, everything = trained(model), list(model.parameters())
    changed, share = bytes_of(mine), 1 / options.devices if options.sharded else 1.0
    gathered, gradients = 0.0, float(changed)
    if options.sharded and options.devices > 1:
        blocks: list[Any] = [*units(model), _Rest(model)]
        unit = max(sum(p.numel() for p in block.parameters()) for block in blocks)
        gathered = 2 * unit * compute.itemsize
        gradients = changed * share + (unit * compute.itemsize if mine else 0)
    elif options.devices > 1:
        gradients *= 2
    momentary = changed * share if options.foreach and options.optim == "adamw_torch" else 0.0
    # The attacker's copy; while it attacks, its gradients and their sum, and AdamW's moments of what it trains.
    attacker = {None: 0, "lora": changed, "all": bytes_of(everything)}[options.attacker] * share
    if options.attacker:
        momentary = max(momentary, attacker * (2 + 2 * (options.attacker == "all")) + activations)
    return Memory(
        weights=bytes_of([*everything, *model.buffers()]) * share,
        moments=moment_bytes(mine, options.optim) * share,
        teacher=changed * share if options.teacher else 0.0,
        average=changed * share if options.average else 0.0,
        attacker=attacker,
        gradients=gradients,
        activations=float(activations),
        gathered=gathered,
        momentary=momentary,
        host=2.0 * changed if options.guard else 0.0,
        host_momentary=float(changed * (options.guard + options.average)),
        together=options.accumulation > 1,
        waiting=0.0 if options.sharded or options.primary == 1 else float(changed),
        left=0.0 if options.primary == 1 else options.primary * activations,
    )

PLACES = {"1 device": (1, False), "8, DDP": (8, False), "2, FSDP2": (2, True), "8, FSDP2": (8, True)}
"""Devices, and whether they shard the model."""


def told(plan: Callable[..., Memory]) -> str:
    """GB by purpose and place as a Markdown table; ``plan`` takes ``devices`` and ``sharded``."""
    parts = ("weights", "moments", "teacher", "average", "attacker", "gradients", "activations", "gathered", "peak",
             "host")  # fmt: skip
    lines = [f"| GB on each device | {' | '.join(parts)} |", f"|{'---|' * (len(parts) + 1)}"]
    for name, (devices, sharded) in PLACES.items():
        found = plan(devices=devices, sharded=sharded)
        lines.append(f"| {name} | {' | '.join(f'{getattr(found, part) / 1e9:.2f}' for part in parts)} |")
    return "\n".join(lines)


def units(model: nn.Module) -> list[nn.Module]:
    """The blocks that repeat: what is checkpointed, and what FSDP2 gathers at a time.

    The classes that the model itself names as not to be split, else the largest entries of its module lists.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    outer = _outermost(model, found)
    if len(outer) > 1:
        return outer
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    entries = [entry for some in lists for entry in some if re.search(_BLOCK_NAMES, type(entry).__name__)]
    return _outermost(model, entries, innermost=True) or list(model.children())


def _outermost(model: nn.Module, found: list[nn.Module], innermost: bool = False) -> list[nn.Module]:
    """Of nested modules the outer ones, or the inner ones."""
    chosen = {id(module) for module in found}
    for module in found:
        inside = [part for part in module.modules() if part is not module and id(part) in chosen]
        if innermost and inside:
            chosen.discard(id(module))
        elif not innermost:
            chosen -= {id(part) for part in inside}
    return [module for module in found if id(module) in chosen]


class _Rest:
    """The parameters outside of all units: the root's own group under FSDP2."""

    def __init__(self, model: nn.Module):
        inside = {id(p) for unit in units(model) for p in unit.parameters()}
        self._parameters = [p for p in model.parameters() if id(p) not in inside]

    def parameters(self) -> list[nn.Parameter]:
        return self._parameters


@contextmanager
def fake(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, ``model`` (on the meta device) and whatever is made are fake tensors of a CPU: shapes without memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng():
        flags = [parameter.requires_grad for parameter in model.parameters()]
        model.to_empty(device="cpu")
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
        yield model


def watch_forward(
    model: nn.Module, forward: Callable[[], Any], autocast: torch.dtype | None = None
) -> Activations:
    """Bytes that ``forward`` of ``model`` keeps for backward; run it inside ``fake`` to allocate none of them.

    Args:
        model: in training mode.
        forward: runs it once.
        autocast: what matrix products are computed in.
    """
    blocks = units(model)
    places = {id(block): place for place, block in enumerate(blocks)}
    kept, inputs, inside = [0] * len(blocks), [0] * len(blocks), [-1]
    outside = [0]
    seen = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if (place := _storage(tensor)) not in seen:
            seen.add(place)
            alive.append(tensor)  # or its storage's number would be used again
            size = tensor.untyped_storage().nbytes()
            if inside[-1] < 0:
                outside[0] += size
            else:
                kept[inside[-1]] += size
        return tensor

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        inside.append(places[id(module)])
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.requires_grad]
        inputs[inside[-1]] += sum(one.nbytes for one in given)

    def leave(*_: Any) -> None:
        inside.pop()

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        casts = torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None)
        with torch.enable_grad(), casts, _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return Activations(outside[0], tuple(kept), tuple(inputs))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Fused(torch.autograd.Function):
    """Attention as a fused kernel keeps it: its three inputs, its answer, and a log-sum a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        answer = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, answer, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return answer

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(one) for one in ctx.saved_tensors[:3])


class _FusedAttention(TorchFunctionMode):
    """Has ``scaled_dot_product_attention`` keep what a fused kernel would; only shapes of the answer are right."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            query, key, value = args[:3] if len(args) >= 3 else [(kwargs or {})[n] for n in ("query", "key", "value")]
            if torch.is_autocast_enabled("cpu"):
                query, key, value = (one.to(torch.get_autocast_dtype("cpu")) for one in (query, key, value))
            return _Fused.apply(query, key, value)
        return func(*args, **(kwargs or {}))
