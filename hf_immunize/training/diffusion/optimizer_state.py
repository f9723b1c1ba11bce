"""The state of any optimizer as tensors by name and a tree of plain values: what safetensors and JSON can hold.

Our own, since ``torch.distributed.checkpoint.state_dict`` loads through ``load_state_dict``, which casts moments to
their parameter's dtype (float32 ones beside bfloat16 weights come back rounded, the resumed run is another one), and
what it returns is nested still, with bitsandbytes' dicts and torchao's tensor classes, which no safetensors file holds.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_immunize.errors import RecordError
from hf_immunize.training.core.sharding import split_like

_PACKAGES = ("torchao.",)
"""Where classes of tensors come from that a checkpoint may name: made of parts, they say how they are put together."""


def as_tree(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` for JSON; its tensors are put into ``tensors`` under names that begin with ``place``.

    Raises:
        RecordError: something that is neither tensor nor plain value.
    """
    if isinstance(value, Tensor) and type(value).__module__.startswith(_PACKAGES):
        names, context = cast(Any, value).__tensor_flatten__()
        parts = {name: as_tree(getattr(value, name), f"{place}.{name}", tensors) for name in names}
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        return {"made": kind, "parts": parts, "context": as_tree(context, place, tensors)}
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"tensor": place}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {"dict": [[name, as_tree(one, f"{place}.{name}", tensors)] for name, one in value.items()]}
    if isinstance(value, list | tuple):
        each = [as_tree(one, f"{place}.{at}", tensors) for at, one in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": each}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise RecordError(
        f"expected an optimizer whose state is tensors and numbers, got {type(value).__name__} in {place}: set "
        "save_steps=0, or use another optim."
    )


def of_tree(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of ``as_tree``. Raises ValueError, KeyError or TypeError for what it did not make."""
    ((kind, content), *rest) = tree.items()
    if kind == "made":
        return _class_of(content).__tensor_unflatten__(
            {name: of_tree(part, tensors) for name, part in tree["parts"].items()}, of_tree(tree["context"], tensors),
            None, None,
        )  # fmt: skip
    if rest:
        raise ValueError(f"unknown entry {sorted(tree)}")
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "dict":
        return {name: of_tree(one, tensors) for name, one in content}
    if kind in ("list", "tuple"):
        found = [of_tree(one, tensors) for one in content]
        return found if kind == "list" else tuple(found)
    if kind == "value":
        return content
    raise ValueError(f"unknown entry {kind!r}")


def flatten_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by place, and the tree they belong into: all of ``state_dict`` but the groups' parameters.

    Raises:
        RecordError: the optimizer holds something that is neither tensor nor plain value.
    """
    whole = optimizer.state_dict()
    groups = [{name: value for name, value in group.items() if name != "params"} for group in whole["param_groups"]]
    tensors: dict[str, Tensor] = {}
    return tensors, {"state": as_tree(whole["state"], "state", tensors), "groups": as_tree(groups, "groups", tensors)}


def restore_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], tree: Mapping[str, Any]) -> None:
    """Put back what ``flatten_state`` gave, bit for bit, in the dtypes it had.

    Raises:
        ValueError, KeyError, TypeError: another optimizer's state.
    """
    own = optimizer.state_dict()["param_groups"]
    groups = of_tree(tree["groups"], tensors)
    if len(groups) != len(own):
        raise ValueError(f"{len(groups)} parameter groups instead of {len(own)}")
    state = of_tree(tree["state"], tensors)
    # Whole tensors of a checkpoint are shared out as their parameters are.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {at: {name: _split(one, parameters[at]) for name, one in kept.items()} for at, kept in state.items()}
    told = [group | {"params": mine["params"]} for group, mine in zip(groups, own, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": told})
    # torch casts a state's tensors to the dtype of its parameter, which loses what is kept wider, and widens the rest.
    for place, kept in state.items():
        parameter = parameters[place]
        held = optimizer.state[parameter]
        for name in kept.keys() & held.keys():  # bitsandbytes packs and unpacks a part of its own
            held[name] = _exactly(kept[name], held[name], parameter)


def _split(value: Any, like: Tensor) -> Any:
    alike = isinstance(like, DTensor) and getattr(value, "shape", None) == like.shape
    return split_like(value, like) if alike else value


def _exactly(kept: Any, held: Any, parameter: Tensor) -> Any:
    """What was kept, where ``load_state_dict`` put it: tensors on the device it chose for them."""
    if isinstance(kept, Tensor):
        if isinstance(held, Tensor):
            return held if held.dtype == kept.dtype else kept.to(held.device)
        return kept.to(parameter.device)
    if isinstance(kept, Mapping):
        inner = held if isinstance(held, Mapping) else {}
        return {name: _exactly(one, inner.get(name), parameter) for name, one in kept.items()}
    if isinstance(kept, list | tuple):
        return type(kept)(_exactly(one, None, parameter) for one in kept)
    return kept


def _class_of(name: str) -> Any:
    if not name.startswith(_PACKAGES):
        raise ValueError(f"tensors of class {name}")
    module, _, last = name.rpartition(".")
    found = getattr(importlib.import_module(module), last)
    if not (isinstance(found, type) and issubclass(found, Tensor)):
        raise ValueError(f"tensors of class {name}")
    return found
