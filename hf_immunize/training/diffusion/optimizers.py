"""Any optimizer that ``TrainingArguments.optim`` names, made by transformers' own table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from hf_immunize.errors import ConfigError
from hf_immunize.training.diffusion.config import DiffusionImmunizationConfig

_BY_ELEMENT = {"adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"}
"""Optimizers that work number by number: on a part of a weight as on the whole."""
_UNSTORABLE = ("galore_torch", "apollo_torch")
"""Packages whose optimizers keep objects of their own beside tensors."""


def optimizer_of(
    args: DiffusionImmunizationConfig, model: nn.Module, parameters: Sequence[nn.Parameter], *, split: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that ``args.optim`` and ``args.optim_args`` name, over ``parameters`` of ``model``.

    ``split`` says that these are shared out over ranks.

    Raises:
        ConfigError: a name that transformers does not know, a package that is not installed, arguments it does not
            take, or an optimizer that steps by itself during backward.
    """
    from transformers import Trainer

    if split and args.optim not in _BY_ELEMENT:
        raise ConfigError(
            f"expected an optim among {sorted(_BY_ELEMENT)} under FSDP2, got {args.optim!r}: its state does not have "
            "the shape of the weights, and was never tried in parts. Use DDP."
        )
    if args.optim.endswith("_layerwise"):
        _refuse_own_steps(args)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(_as_transformers_wants(args), cast(Any, model))
        groups: Any = options.pop("params", [{"params": list(parameters), "weight_decay": args.weight_decay}])
        if "model" in options or not _is_class(kind):
            _refuse_own_steps(args)
        if args.save_steps and kind.__module__.startswith(_UNSTORABLE):
            raise ConfigError(
                f"expected an optimizer whose state is tensors for save_steps={args.save_steps}, got "
                f"optim={args.optim!r}: it keeps objects of its own. Set save_steps=0, or use another optimizer."
            )
        made = kind(groups, **options)
    except (ImportError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        raise ConfigError(
            f"expected an optim of TrainingArguments that is installed, with optim_args it takes, got "
            f"optim={args.optim!r}, optim_args={args.optim_args!r}: {error}"
        ) from error
    if hasattr(made, "eval") and args.ema_decay:
        raise ConfigError(
            f"expected ema_decay=0 for optim={args.optim!r}, got {args.ema_decay}: it averages the weights itself."
        )
    _keep_embeddings_whole(made, options, model)
    return made


def _refuse_own_steps(args: DiffusionImmunizationConfig) -> None:
    raise ConfigError(
        f"expected an optimizer that steps when it is told to, got optim='{args.optim}': it steps inside backward, "
        "before the terms' gradients are complete. Use an 8-bit optimizer (adamw_bnb_8bit, adamw_torch_8bit) or "
        "adafactor for memory."
    )


def _as_transformers_wants(args: DiffusionImmunizationConfig) -> Any:
    """What the table reads, with the defaults of TrainingArguments; making these would reset Accelerate's state."""
    from transformers import TrainingArguments
    from transformers.training_args import OptimizerNames, ParallelMode

    told = {one.name: one.default for one in fields(TrainingArguments) if one.default is not MISSING}
    told |= {name: value for name, value in asdict(args).items() if name in told}
    target = args.optim_target_modules
    modules = target.split(",") if target and target.replace("_", "-") != "all-linear" else target
    told |= {"optim": OptimizerNames(args.optim), "optim_target_modules": modules}
    return SimpleNamespace(**told, parallel_mode=ParallelMode.NOT_DISTRIBUTED)


def _is_class(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)


def _keep_embeddings_whole(optimizer: torch.optim.Optimizer, options: dict[str, Any], model: nn.Module) -> None:
    """As transformers' Trainer does: bitsandbytes keeps moments of embeddings in 32 bits."""
    if "bitsandbytes" not in type(optimizer).__module__ or options.get("optim_bits") != 8:
        return
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


@contextmanager
def weights_to_judge(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the parameters hold what the optimizer would return: schedule-free ones train at another point."""
    switches = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
    if switches:
        optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if switches:
            optimizer.train()  # type: ignore[attr-defined]
