"""Models whose weights are split over ranks by FSDP2, and whole tensors out of the parts and back into them.

Both trainers shard by themselves, with accelerate's own policy of what is one block, before anything is read from the
model that has to be read again later. From there on a model that ``accelerate launch`` asked to shard and one that was
loaded with transformers' DistributedConfig are the same to them: parameters are DTensors, everything computed from them
element by element (averages, copies, optimizer state) is one too, and ``accelerate`` itself wraps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.other import get_module_children_bottom_up
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_immunize.errors import ConfigError
from hf_immunize.training.core.distributed import world


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are split over ranks (FSDP2, tensor parallelism)."""
    split = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return split or any(isinstance(module, FSDPModule) for module in model.modules())


def settle(model: nn.Module) -> nn.Module:
    """Let every part of a sharded model hold its own share again.

    After a forward that no backward followed, the outermost group is still whole: ``named_parameters`` would give
    tensors that no optimizer may hold and into which nothing may be copied. ``state_dict`` does this by itself.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model


def original_class(model: nn.Module) -> type[Any]:
    """The class of a model before FSDP2 put its own in front."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def shard(model: nn.Module, plugin: FullyShardedDataParallelPlugin, device: torch.device) -> bool:
    """FSDP2 over all ranks, one group per block that the plugin's policy names and one for the rest; in place.

    Weights stay in the precision they are in: autocast rounds copies, as under DDP, so that gradients are reduced and
    weights updated with all digits. False, and nothing done, for one process.

    Raises:
        ConfigError: blocks that cannot be found, or a block with weights of more than one dtype.
    """
    if world()[1] == 1 or isinstance(model, FSDPModule):
        return False
    try:
        plugin.set_auto_wrap_policy(model)
        policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    except ValueError as error:
        raise ConfigError(f"expected fsdp_transformer_layer_cls_to_wrap of {type(model).__name__}: {error}") from error
    mesh = init_device_mesh(device.type, (world()[1],))
    blocks = [part for part in get_module_children_bottom_up(model)[:-1] if policy is not None and policy(part)]
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=bool(plugin.reshard_after_forward))
    fully_shard(model, mesh=mesh)
    return True


def first_rank_where(mine: bool) -> int | None:
    """The lowest rank that says yes, the same everywhere; None where none does. Every rank takes part."""
    told: list[bool] = [False] * world()[1]
    if world()[1] > 1:
        dist.all_gather_object(told, mine)
    else:
        told = [mine]
    return told.index(True) if True in told else None


def sharded_blocks(model: nn.Module) -> list[str]:
    """Names of the parts that are gathered and freed by themselves, without the model itself."""
    return [name for name, module in model.named_modules() if name and isinstance(module, FSDPModule)]


def empty_twin(model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """A second model with the weights of a sharded one, sharded alike: ``build`` makes it, its own weights are dropped.

    FSDP2 modules cannot be copied.

    Raises:
        ConfigError: ``build`` makes a model of other parameters.
    """
    with init_empty_weights():
        twin = build()
    settle(model)
    meshes = {parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)}
    (mesh,) = meshes
    for name in reversed(sharded_blocks(model)):
        fully_shard(twin.get_submodule(name), mesh=mesh)
    fully_shard(twin, mesh=mesh)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if other := state.keys() ^ twin.state_dict().keys():
        raise ConfigError(
            f"expected a sharded model as its configuration describes it for a copy of θ₀, got {sorted(other)[:5]} on "
            "one side only: change modules before sharding, or use DDP."
        )
    twin.load_state_dict(state, strict=True, assign=True)
    _copy_buffers(model, twin)
    return twin


def whole_copy(model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module | None:
    """A model with the whole weights of a sharded one, on the CPU of the first rank; None elsewhere.

    Every rank takes part. ``build`` makes the model, its own weights are dropped.
    """
    state = whole_on_cpu(model.state_dict(), keep=world()[0] == 0)
    if world()[0]:
        return None
    with init_empty_weights():
        twin = build()
    twin.load_state_dict(state, strict=True, assign=True)
    _copy_buffers(model, twin)
    for name, parameter in model.named_parameters():
        twin.get_parameter(name).requires_grad_(parameter.requires_grad)
    return twin.train(model.training)


def _copy_buffers(model: nn.Module, twin: nn.Module) -> None:
    """Also those that are no part of the state."""
    for name, value in model.named_buffers():
        owner, _, last = name.rpartition(".")
        place = twin.get_submodule(owner)
        setattr(place, last, value.detach().to(getattr(place, last).device).clone())


# ---- gradients ----------------------------------------------------------------------------------------------------


class _Reach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.save_for_backward(*outputs)
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(output) for output in ctx.saved_tensors)


def reach(outputs: Sequence[Tensor]) -> Tensor:
    """Zero, with a gradient of exact zeros at every one of a forward's ``outputs``.

    FSDP2 gathers a block's weights for backward when a gradient reaches the block's output. A term's gradient enters
    at a site; where that is inside a block and nothing else comes in from behind it, this does, and every operation
    before the site waits for it, since the site's own layer lies between the two.
    """
    wanted = [output for output in outputs if output.requires_grad]
    return _Reach.apply(*wanted) if wanted else torch.zeros(())


@contextmanager
def reduced_later(model: Any) -> Iterator[None]:
    """Inside, backward adds up whole gradients and leaves their reduction to a later one: ``no_sync`` of FSDP2."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


# ---- whole tensors ------------------------------------------------------------------------------------------------


def whole(value: Tensor) -> Tensor:
    """All of a tensor; every rank takes part where it is split."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_on_cpu(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole copies on the CPU where ``keep``, one gathered at a time; elsewhere nothing. Every rank takes part."""
    found = {}
    for name, value in tensors.items():
        everything = whole(value.detach())
        if keep:
            found[name] = everything.cpu().contiguous().clone()
    return found


def split_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of ``value``, which every rank holds, on the device of ``like`` and split as it is.

    What is split already stays as it is.
    """
    value = value.to(like.device)
    if isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def split_state(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``split_like`` by name; tensors without a counterpart stay as they are."""
    return {name: split_like(value, like[name]) if name in like else value for name, value in tensors.items()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name on the first rank, whole; elsewhere nothing. Every rank takes part."""
    settle(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: dict[str, Any] = {**get_optimizer_state_dict(model, optimizer, options=options)}
    state = whole.get("state", {})
    return {f"{name}:{key}": torch.as_tensor(value) for name, held in state.items() for key, value in held.items()}


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Take back what ``optimizer_tensors`` returned on the first rank; every rank holds it whole.

    Raises:
        KeyError: no state of a trained parameter.
    """
    settle(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    mine = StateDictOptions(full_state_dict=False)
    now: dict[str, Any] = {**get_optimizer_state_dict(model, optimizer, options=mine)}
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, part = key.rpartition(":")
        state.setdefault(name, {})[part] = value
    for name in now["state"]:
        if name not in state:
            raise KeyError(name)
    set_optimizer_state_dict(model, optimizer, cast(Any, {**now, "state": state}), options=options)
