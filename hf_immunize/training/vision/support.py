"""Combinations of hardware options that are refused, each with its reason, rather than trained silently wrong.

What is left is exact: tests/training/test_devices.py and test_distributed.py compare each with one process in float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.utils import logging

from hf_immunize.errors import ConfigError
from hf_immunize.features import under_adapters
from hf_immunize.training.core.launching import refuse_deepspeed_of, sharding_plugin
from hf_immunize.training.core.registry import COPYING
from hf_immunize.training.core.sharding import is_sharded

logger = logging.get_logger(__name__)

_LAUNCHER = "accelerate's launcher or configuration file"


def refuse_deepspeed(args: Any) -> None:
    """Raise ConfigError for DeepSpeed, asked for by an option or by ``accelerate launch``.

    Called before TrainingArguments look for the package, so that the reason does not depend on its being installed.
    """
    refuse_deepspeed_of("in the options" if args.deepspeed is not None else None)


def use_one_device(args: Any) -> None:
    """Train on one device per process: where several GPUs are visible to a single process, the stock Trainer would
    wrap the model in DataParallel, multiply the batch, and read features of one replica only."""
    if args.n_gpu > 1:
        logger.warning(
            f"{args.n_gpu} GPUs are visible to one process, and one is used: start with `accelerate launch "
            f"--num_processes {args.n_gpu}` to use all of them."
        )
        args._n_gpu = 1


def refuse_unsupported(args: Any) -> None:
    """Raise ConfigError for options that cannot give the gradient of the global batch, or were never shown to."""
    if args.torch_compile:
        raise ConfigError(
            "expected torch_compile off: features are read by hooks, which a compiled model does not call. Compile the "
            "released model instead."
        )
    if args.auto_find_batch_size:
        raise ConfigError(
            "expected auto_find_batch_size off: the rows of a step decide what its spectrum says, and a step that ran "
            "out of memory has already left rows in the feature bank. Set per_device_train_batch_size."
        )
    sharding_plugin(args.fsdp_plugin_args)
    _refuse_precision(args)
    _refuse_with_checkpointing(args)
    if args.attacker_rank and ("imma" in args.objectives or not _simulates(args)):
        _refuse_with_lora(args)
    if _simulates(args):
        _refuse_with_attack(args)
    if args.cache_frozen_features and args.augmentation:
        raise ConfigError(
            "expected cache_frozen_features or augmentation, got both: cached activations are of unchanged images."
        )


def _refuse_precision(args: Any) -> None:
    if args.mixed_precision not in ("no", "bf16"):
        raise ConfigError(
            f"expected mixed precision 'no' or 'bf16', got {args.mixed_precision!r}: gradients of the terms span more "
            "decades than its range, and vanish there. Use bf16."
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ConfigError(
                f"expected {name} off: evaluating the model before training would round the weights that are trained, "
                "and those that are returned. bf16 evaluates under autocast and leaves them alone."
            )


def _refuse_with_checkpointing(args: Any) -> None:
    if not args.activation_checkpointing:
        return
    # torch's default is the reentrant kind. Trainer reads the new name, older code the old one.
    options = {"use_reentrant": False} | dict(args.activation_checkpointing_kwargs or {})
    args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs = options
    if options["use_reentrant"]:
        _refuse_reentrant("activation_checkpointing_kwargs")
    if args.cache_frozen_features:
        raise ConfigError(
            "expected cache_frozen_features or activation_checkpointing, got both: checkpointing repeats a forward "
            "whose beginning was skipped. The cache alone saves more memory."
        )
    if args.precondition_gradients:
        raise ConfigError(
            "expected precondition_gradients or activation_checkpointing, got both: the correction needs the graph of "
            "the forward a second time."
        )


def _refuse_with_lora(args: Any) -> None:
    """What the attacker's LoRA updates cannot be combined with: other terms would see an attacked model's features."""
    if args.objective.strip() != "imma" or args.sites != "head":
        raise ConfigError(
            f"expected objective imma alone at sites=head with attacker_rank, got {args.objective} at "
            f"{args.sites}: set attacker_rank=0 for other objectives and sites."
        )
    if args.activation_checkpointing or args.cache_frozen_features:
        raise ConfigError(
            "expected neither activation_checkpointing nor cache_frozen_features with attacker_rank, got one: a "
            "forward that is repeated or begins late would not have the attacker's updates."
        )


def _simulates(args: Any) -> list[str]:
    """Objectives of this run whose attackers train a copy of the model."""
    return [name for name in args.objectives if name in COPYING]


def _refuse_with_attack(args: Any) -> None:
    """An attacker of all weights trains the frozen part as well, and an image model's has no exact gradient."""
    if args.cache_frozen_features and not args.attacker_rank:
        name = _simulates(args)[0]
        raise ConfigError(
            f"expected attacker_rank of at least 1 for {name} with cache_frozen_features, got 0: an attacker "
            "of all weights trains the part whose activations are cached. Set attacker_rank, or turn the cache off."
        )


def _refuse_reentrant(where: str) -> None:
    raise ConfigError(
        f"expected {where} with use_reentrant=False: reentrant checkpointing hands out features without a gradient, "
        "silently."
    )


def refuse_accelerator(accelerator: Any) -> None:
    """Raise ConfigError for what ``accelerate launch`` adds that no option shows: FSDP, compilation, other engines."""
    state = accelerator.state
    if getattr(state, "fsdp_plugin", None) is not None:
        raise ConfigError(
            "expected the trainer to create the first Accelerator under FSDP, got one from before: it would shard a "
            "second time. Create your own after the trainer, or use PartialState."
        )
    if str(getattr(getattr(state, "dynamo_plugin", None), "backend", "NO")).rpartition(".")[2] != "NO":
        raise ConfigError(
            f"expected no dynamo backend from {_LAUNCHER}, got {state.dynamo_plugin.backend}: features are read by "
            "hooks, which a compiled model does not call."
        )
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU"):
        raise ConfigError(
            f"expected one process or DistributedDataParallel from {_LAUNCHER}, got {kind}: it has not been shown to "
            "give the gradient of the global batch."
        )


def refuse_model(args: Any, model: nn.Module) -> None:
    """Raise ConfigError for a model that was compiled, checkpointed or split in a way its features do not survive."""
    for module in model.modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ConfigError(
                "expected a model that is not compiled, got one: features are read by hooks, which a compiled model "
                "does not call. Compile the released model instead."
            )
        if getattr(module, "gradient_checkpointing", False):
            _refuse_checkpointed(args, module)
    if under_adapters(model) is not model and args.attacker_rank and _simulates(args):
        raise ConfigError(
            f"expected attacker_rank=0 for {_simulates(args)[0]} of a {type(model).__name__}, got "
            f"{args.attacker_rank}: factors of an attacker's own beside those of PEFT were not tried. Set "
            "attacker_rank=0, or train the model itself (merge_and_unload)."
        )
    _refuse_split(model)
    if is_sharded(model):
        refuse_sharded(args)
        refuse_copies(args)


def _refuse_checkpointed(args: Any, module: nn.Module) -> None:
    """Checkpointing that was turned on at the model itself, where no option shows it."""
    words = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    if words.get("use_reentrant", True):
        _refuse_reentrant("activation checkpointing of the model")
    for name in ("cache_frozen_features", "precondition_gradients"):
        if getattr(args, name):
            raise ConfigError(
                f"expected {name} or activation checkpointing, got both: the model has checkpointing on. Call "
                "model.activation_checkpointing_disable()."
            )


def _refuse_split(model: nn.Module) -> None:
    """Parallelism at loading time other than plain FSDP2."""
    asked = getattr(getattr(model, "config", None), "distributed_config", None)
    if asked is None:
        return
    sizes = {name: getattr(asked, name, None) or 1 for name in ("tp_size", "pp_size", "ep_size", "dp_replicate_size")}
    flags = ("fsdp_cpu_offload", "fsdp_mixed_precision")
    others = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    others += [name for name in flags if getattr(asked, name, False)]
    if others:
        raise ConfigError(
            f"expected a distributed_config with fsdp_size only, got {others}: rows of the global batch are gathered "
            "once from every rank, which was tested for DDP and plain FSDP2. Leave these out; for bf16 set bf16=True."
        )


def refuse_sharded(args: Any) -> None:
    """Raise ConfigError for options that read or write whole parameters, where these are split over ranks."""
    needs_whole = {
        "precondition_gradients": args.precondition_gradients is not None,
        "attacker_rank with imma": args.attacker_rank > 0 and "imma" in args.objectives,
    }
    if asked := [name for name, on in needs_whole.items() if on]:
        raise ConfigError(
            f"expected a model that is whole on every rank for {asked}, got sharded parameters (FSDP2): turn these "
            "options off, or use DDP."
        )


def refuse_copies(args: Any) -> None:
    """Raise ConfigError for an attacker that trains a copy, of a model that was split before it could be copied."""
    if named := _simulates(args):
        raise ConfigError(
            f"expected a model that is whole when it is passed for {named[0]}, got sharded parameters: let "
            "accelerate launch shard it (fsdp_version: 2), or use DDP."
        )


def refuse_terms(args: Any, terms: Iterable[Any]) -> None:
    """Raise ConfigError for terms that need more digits than the features have under autocast."""
    found = [term.name for term in terms if term.full_precision]
    if args.mixed_precision != "no" and found:
        raise ConfigError(
            f"expected mixed precision 'no' for the terms {found}, got {args.mixed_precision!r}: they follow the "
            "smallest eigenvalue of the batch, which rounding of the features decides there. Use condition_number, "
            "group_kappa or closed_form_adversary, or train in float32."
        )
