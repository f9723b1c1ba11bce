"""FSDP2 in the stock Trainer: sharding before anything is measured, whole files out of it, and resuming from them.

Trainer has two ways of its own. One wraps the model when training begins, after θ₀ was measured; the other, for a model
that was split when it was loaded, wraps nothing and cannot resume. Here both become the second, with resuming.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from transformers import PreTrainedModel

from hf_immunize.errors import ConfigError, RecordError
from hf_immunize.records import atomic_write
from hf_immunize.training.core.distributed import world
from hf_immunize.training.core.launching import sharding_ourselves, sharding_plugin
from hf_immunize.training.core.sharding import (
    empty_twin,
    is_sharded,
    load_optimizer_tensors,
    optimizer_tensors,
    original_class,
    reduced_later,
    settle,
    shard,
    split_state,
    whole_on_cpu,
)
from hf_immunize.training.core.teacher import Teacher
from hf_immunize.training.vision.publishing import GatedTrainer

_MOMENTS, _SCHEDULE = "optimizer.safetensors", "scheduler.json"


class ShardedTrainer(GatedTrainer):
    """A ``Trainer`` whose model may be split over ranks."""

    model: Any
    optimizer: Any
    lr_scheduler: Any
    _plugin: FullyShardedDataParallelPlugin | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """As in Trainer, without its own FSDP."""
        asked = self.args.fsdp_plugin_args
        self._plugin = sharding_plugin(asked)
        if asked is not None and world()[1] == 1:
            raise ConfigError("expected several processes for fsdp, got one: start with accelerate launch or torchrun.")
        self.args.fsdp_plugin_args = None
        try:
            with sharding_ourselves():
                super().create_accelerator_and_postprocess()
        finally:
            self.args.fsdp_plugin_args = asked

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Not before it is split: its parts fit where the whole may not."""
        if self._plugin is None or world()[1] == 1:
            super()._move_model_to_device(model, device)

    @property
    def is_split(self) -> bool:
        """Whether weights are split over ranks."""
        return bool(self.is_distributed_loading_by_transformers)

    def split(self, *others: nn.Module | None) -> None:
        """Shard the model if that was asked for, and ``others`` alike; from here on parameters are DTensors."""
        if self._plugin is not None:
            for model in (self.model, *others):
                if model is not None and not is_sharded(model):
                    shard(model, self._plugin, self.accelerator.device)
        self.is_distributed_loading_by_transformers = is_sharded(self.model)

    def _frozen_copy(self) -> Teacher:
        """θ₀, split as the model is or is going to be, or whole and with what is frozen held once."""
        model = self.accelerator.unwrap_model(self.model)
        if is_sharded(model):
            twin = lambda: empty_twin(model, lambda: _rebuilt(model))  # noqa: E731
            return Teacher(model, self.accelerator.autocast, twin=twin)
        return Teacher(model, self.accelerator.autocast, share=self._plugin is None)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; the optimizer is to hold this rank's share of every weight.

        An evaluation before training has marked the model as prepared, and DistributedDataParallel would be left out:
        ranks would drift apart without a word.
        """
        bare = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        settle(bare)
        bare.__dict__.pop("_is_accelerate_prepared", None)
        return super()._prepare_for_training(*args, **kwargs)

    def _defer_fsdp_gradient_reduction(self) -> Any:
        return reduced_later(self.model)

    # ---- files ----------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Whole weights in one file, as from one process."""
        if not self.is_split:
            super()._save(output_dir, state_dict)
            return
        bare = self.accelerator.unwrap_model(self.model)
        state = whole_on_cpu(bare.state_dict(), keep=self.args.should_save)
        if self.args.should_save:
            with _told_nothing(bare):
                super()._save(output_dir, state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_split:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        tensors = optimizer_tensors(self.accelerator.unwrap_model(self.model), _plain(self.optimizer))
        if self.args.should_save:
            atomic_write(Path(output_dir) / _MOMENTS, save(tensors))
            atomic_write(Path(output_dir) / _SCHEDULE, json.dumps(self.lr_scheduler.state_dict()))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        folder, bare = Path(checkpoint or ""), self.accelerator.unwrap_model(self.model)
        if checkpoint is None or not (self.is_split or (folder / _MOMENTS).exists()):
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            try:
                load_optimizer_tensors(bare, _plain(self.optimizer), load_file(folder / _MOMENTS))
                schedule = json.loads((folder / _SCHEDULE).read_text(encoding="utf-8"))
                self.lr_scheduler.load_state_dict(schedule)
                for group, rate in zip(self.optimizer.param_groups, schedule["_last_lr"], strict=True):
                    group["lr"] = rate
            except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
                raise RecordError(
                    f"expected {_MOMENTS} and {_SCHEDULE} of this model in {folder}, got {error!r}: resume from a "
                    "checkpoint that was written under FSDP2, on any number of processes."
                ) from error


def load_whole(folder: str, bare: PreTrainedModel) -> None:
    """The weights in a folder, every one of them, into a model that may be split."""
    kind, config = original_class(bare), _unsplit(bare.config)
    loaded = kind.from_pretrained(folder, config=config, dtype=bare.dtype, use_safetensors=True)
    bare.load_state_dict(split_state(loaded.state_dict(), bare.state_dict()), strict=True)


@contextmanager
def resumable(args: Any, model: nn.Module) -> Iterator[None]:
    """Inside, Trainer's constructor does not refuse to save the state of a model that was split when loaded."""
    kept = args.save_only_model
    args.save_only_model = kept or is_sharded(model)
    try:
        yield
    finally:
        args.save_only_model = kept


def _rebuilt(model: nn.Module) -> nn.Module:
    """A model of the same class and configuration, not split."""
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"expected a transformers model to copy θ₀ of split weights, got {original_class(model).__name__}: pass it "
            "whole and let accelerate launch shard it, or use DDP."
        )
    return original_class(model)(_unsplit(model.config))


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _unsplit(config: Any) -> Any:
    """A copy of a configuration that asks for no sharding."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "distributed_config"):
        del plain.distributed_config
    return plain


@contextmanager
def _told_nothing(model: nn.Module) -> Iterator[None]:
    """Inside, a model's configuration does not ask for sharding, so that it saves the state it is given."""
    config: Any = getattr(model, "config", None)
    kept: Mapping[str, Any] = getattr(config, "__dict__", {})
    asked = kept.get("distributed_config")
    if asked is not None:
        del config.distributed_config
    try:
        yield
    finally:
        if asked is not None:
            config.distributed_config = asked
