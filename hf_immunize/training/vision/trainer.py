"""``ImmunizationTrainer``: binds objective, weights, guard and the harmful stream to ``transformers.Trainer``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from hf_immunize.data import has_transform, is_stream, named_workers
from hf_immunize.errors import ConfigError
from hf_immunize.models import refuse_below_float32, refuse_non_finite
from hf_immunize.records import OutcomeRecord, UtilityGuardRecord
from hf_immunize.training.core.average import WeightAverage
from hf_immunize.training.core.changing import ChangingPart
from hf_immunize.training.core.distributed import world
from hf_immunize.training.core.guard import UtilityGuard
from hf_immunize.training.core.guarded import GuardedRun
from hf_immunize.training.core.meter import Meter
from hf_immunize.training.core.objective import GlobalObjective
from hf_immunize.training.core.registry import terms_of
from hf_immunize.training.core.sharding import reach
from hf_immunize.training.core.state import CheckpointState, Stateful
from hf_immunize.training.core.watch import Watch
from hf_immunize.training.vision.before import measure_references, measure_temperature
from hf_immunize.training.vision.caching import cache_of, with_cached_images, with_cached_rows
from hf_immunize.training.vision.callbacks import Averaging, Ending, Watching
from hf_immunize.training.vision.checkpointing import StrictTrainer, checkpoint_for
from hf_immunize.training.vision.checks import (
    check_data,
    check_unlabelled,
    dtype_of_images,
    forward_of_first,
    head_of,
    held_out_of,
    matched,
    refuse_no_model,
    refuse_streams,
)
from hf_immunize.training.vision.collators import collators_of, where_labelled
from hf_immunize.training.vision.config import ImmunizationConfig
from hf_immunize.training.vision.distillation import ROWS, Temperature, evenly
from hf_immunize.training.vision.dropout import dropout_before
from hf_immunize.training.vision.forwards import Forwards
from hf_immunize.training.vision.frozen import FeatureCache, FrozenPart, freeze_all_but
from hf_immunize.training.vision.guard_metric import measured_base, points_of, refuse_lower_is_better
from hf_immunize.training.vision.harmful_stream import HarmfulStream
from hf_immunize.training.vision.harmful_task import HarmfulTask
from hf_immunize.training.vision.held import some_rows, with_held
from hf_immunize.training.vision.identity import compared_options, identity_of
from hf_immunize.training.vision.keeping import Keeping
from hf_immunize.training.vision.metrics import BaseLabels, metrics_of
from hf_immunize.training.vision.outcome import OutcomeMeter, logged
from hf_immunize.training.vision.primary import REGRESSION, SINGLE, UNLABELLED, RowCheck, named
from hf_immunize.training.vision.probing import Probing
from hf_immunize.training.vision.rate import with_rate
from hf_immunize.training.vision.rows_of_step import rows_of_step
from hf_immunize.training.vision.setup import (
    attacked_task,
    attacker_of,
    build_step,
    learn_attack,
    preconditioner_of,
    settings_of,
)
from hf_immunize.training.vision.sharded import resumable
from hf_immunize.training.vision.sites import choose_layouts, choose_sites
from hf_immunize.training.vision.stock_options import check_stock_options
from hf_immunize.training.vision.support import refuse_accelerator, refuse_model, refuse_sharded, refuse_terms

logger = logging.get_logger(__name__)


class ImmunizationTrainer(StrictTrainer):
    """A ``Trainer`` that immunizes: primary loss + λ·terms on features of primary and harmful rows.

    Used as any Trainer, plus ``harmful_dataset``. The model passed in is θ₀: distillation and the utility guard
    compare with it, also when training resumes from a checkpoint.

    Spectra and the closed-form adversary are those of the *global* batch: rows of all ranks and of all micro-batches
    of one optimizer step. With gradient accumulation the features of the step are computed twice, first without
    gradient for all micro-batches together, then with gradient for each, so that accumulating gives the gradient
    of one large batch exactly.

    Args:
        model: an image model of transformers that returns a loss: a classifier with a linear head, a regression or
            multi-label head, or masked-image pre-training (then name ``sites``).
        args: ImmunizationConfig.
        train_dataset: primary rows with ``pixel_values`` and the ``labels`` of the model's own task, if it has any;
            with numbered rows, or a stream (``IterableDataset``), which is begun again where it ends.
        harmful_dataset: harmful rows of the same shape; labels are the attacker's classes. Objectives that do not tell
            classes apart take rows of one class, of several labels or numbers, and rows without labels.
        harmful_eval_dataset: harmful rows of the same classes that training does not see: whether it worked is then
            measured on them, else on those of ``harmful_dataset``.
        eval_dataset, processing_class, data_collator, compute_metrics, …: as in Trainer. ``compute_metrics`` defaults
            to accuracy, or R² for a regression head.

    Raises:
        DataError: an empty dataset, missing columns, images of another size, labels outside their range, a harmful
            class without rows.
        ConfigError: options that contradict each other or the set-up.
        ModelError: no linear head found, a head of another number of classes, or patterns that fit no module.
    """

    args: ImmunizationConfig
    guard_record: UtilityGuardRecord | None
    objective: GlobalObjective | None
    _cache: FeatureCache | None

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: ImmunizationConfig,
        train_dataset: Any = None,
        harmful_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        harmful_eval_dataset: Any = None,
        **kwargs: Any,
    ):
        if args.max_primary_drop is not None and eval_dataset is None:
            raise ConfigError("expected an eval_dataset for max_primary_drop, got none: pass held-out primary rows.")
        refuse_no_model(model)
        train_dataset, eval_dataset = matched(model, train_dataset), matched(model, eval_dataset)
        args = self._check(model, args, train_dataset, harmful_dataset, eval_dataset)
        self.harmful_dataset, self.primary_dataset = harmful_dataset, train_dataset
        self.harmful_eval_dataset, self._evaluated = harmful_eval_dataset, eval_dataset
        held = held_out_of(harmful_eval_dataset, self.harmful_task, self.terms)
        metrics = compute_metrics or metrics_of(self.kind)
        self._base_labels = BaseLabels(metrics) if metrics is not None and self.kind == SINGLE else None
        check_stock_options(args, self.kind, metrics)
        collator, self._plain_collator = collators_of(data_collator, self.kind, dtype_of_images(model))
        with resumable(args, model):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                data_collator=collator,
                compute_metrics=self._base_labels or metrics,
                **kwargs,
            )
        self._build(model, data_collator, held)

    def _check(self, model: nn.Module, args: ImmunizationConfig, primary: Any, harmful: Any, evaluation: Any) -> Any:
        """Refuse what cannot be trained, and find head, sites and tasks; the options with a rate."""
        refuse_lower_is_better(args.guard_metric)
        refuse_model(args, model)
        refuse_non_finite(model, "the model before immunization")
        self.site, self.terms = head_of(model, args), terms_of(args.objective)
        refuse_streams(args, {"train_dataset": primary, "harmful_dataset": harmful})
        self.kind, seen, self.harmful_task = check_data(model, primary, harmful, evaluation, self.terms)
        with forward_of_first(first := seen[0]):
            args = with_held(args, model, self.kind, rows := some_rows(seen, primary))
            if args.trainable_modules is not None:
                freeze_all_but(model, args.trainable_modules)
            refuse_below_float32(model, "the model")
            if self.kind == UNLABELLED:
                check_unlabelled(model, args, first, self.site)
            self._look_at(model, args, first)
            return with_rate(args, model, rows)

    def _build(self, model: nn.Module, collator: Any, held: HarmfulTask | None) -> None:
        """What Trainer's own constructor has to have run for: devices, precision, callbacks."""
        args = self.args
        refuse_accelerator(self.accelerator)
        # The loss is a per-batch mean; without both lines the stock Trainer multiplies it by world x accumulation
        # for models that accept loss kwargs.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self._build_step(model)
        asked = args.feature_distillation > 0 or (args.distillation > 0 and not args.cache_frozen_features)
        self._teacher = self._frozen_copy() if asked else None
        self._share_out()
        self._build_guard(model)
        self._keeping = Keeping(self.forwards, self.temperature, self._teacher, self.meter)
        if args.cache_frozen_features:
            rows = {"train_dataset": self.train_dataset, "harmful_dataset": self.harmful_dataset}
            self._cache = cache_of(self.forwards, model, self.accelerator, collator, self._largest_batch, rows)
        self._draw_from(held)
        if args.probe_steps:
            self.add_callback(Probing(args.probe_steps, self._probe, lambda: self.bare, self._judged, self.log))

    def _draw_from(self, held: HarmfulTask | None) -> None:
        """Read the rows as they are now from here on: images, or cached activations in their place."""
        self.trained_on = {"primary": self.train_dataset, "harmful": self.harmful_task.rows}
        drawn = partial(HarmfulStream.of, self.args, self.harmful_task, self._plain_collator)
        self._streams = {"harmful": drawn(), "attack": drawn(answers=True)}
        self._outcome_meter = self._make_outcome(held)

    def _look_at(self, model: nn.Module, args: ImmunizationConfig, row: Mapping[str, Any]) -> None:
        """Sites with their weights, how an input there or at the head becomes one row per image, the frozen part."""
        sample = torch.as_tensor(row["pixel_values"])
        refuse_terms(args, self.terms)
        self.site_weights = choose_sites(model, args.sites, args.site_weights, self.site, sample)
        depths = args.attacker_depths
        self._depths = list(choose_sites(model, depths, None, self.site, sample)) if depths else []
        self.layouts = choose_layouts(model, [*self.site_weights, self.site, *self._depths], args.site_layouts, row)
        self.frozen, self._kept = FrozenPart(model, sample.shape), dropout_before(model, self.layouts, row)
        self._cache = None

    def _build_step(self, model: nn.Module) -> None:
        """The step and what it is measured by; simulated attackers copy the model while it is whole."""
        args = self.args
        self.watch = Watch(self.terms)
        self.meter = Meter(self.watch)
        self.attacker, self.preconditioner = attacker_of(args, model, self.site), preconditioner_of(args, model)
        self.forwards = Forwards(
            args, kind=self.kind, head=self.site, sites=list(self.site_weights),
            layers=list(self.preconditioner.layers) if self.preconditioner else [], layouts=self.layouts,
            frozen=self.frozen, undropped=self._kept, attacker=self.attacker, context=self.compute_loss_context_manager,
        )
        task = attacked_task(self.forwards, model, self._attack_batch, self.harmful_task, self._depths)
        self.settings = settings_of(args, self.harmful_task.classes)
        self.step = build_step(
            args, self.terms, self.settings, self.site_weights, task, self.preconditioner, self.meter
        )
        self.objective = self.step.objective

    @property
    def teacher(self) -> nn.Module | None:
        """The copy of θ₀ that is imitated; None without distillation, or where its logits are cached."""
        return None if self._teacher is None else self._teacher.model

    def _share_out(self) -> None:
        """Split weights over ranks, if that was asked for."""
        self.split(self.teacher)
        if self.is_split:
            refuse_sharded(self.args)
            self.step.to(self.accelerator.device)

    def _build_guard(self, model: nn.Module) -> None:
        """What keeps weights: the average, the guard, checkpoints."""
        args = self.args
        metric = "r2" if self.kind == REGRESSION and args.guard_metric == "accuracy" else args.guard_metric
        self.average = WeightAverage(model, args.ema_decay) if args.ema_decay else None
        self.guard = UtilityGuard(args.max_primary_drop, metric, args.max_strength_factor)
        changing, told = ChangingPart(model), f"max_primary_drop={args.max_primary_drop}"
        self.guarded = GuardedRun(self.guard, self.watch, self.step, changing, told)
        self.temperature = Temperature()
        self.guard_record = None
        self.outcome: OutcomeRecord | None = None
        """Whether it worked; set when training ends."""
        parts: dict[str, Stateful | None] = {"step": self.step, "average": self.average, "attacker": self.attacker}
        parts |= {"temperature": self.temperature} if args.distillation else {}
        self.checkpoint_state = CheckpointState(parts, self.guard, self.watch)
        self.add_callback(Watching(self.watch, self.meter))
        self.callback_handler.callbacks.insert(0, Ending(self._finish))
        if self.average:
            self.add_callback(Averaging(self.average, lambda: self.bare))

    def _make_outcome(self, held: HarmfulTask | None) -> OutcomeMeter:
        """Measures the held-out harmful rows, or those that are trained on."""
        return OutcomeMeter(
            held or self.harmful_task,
            held_out=held is not None, collate=self._plain_collator,
            capture=lambda model, batch: self.forwards.at_sites_and_head(model, self._prepare_inputs(batch)),
            sites=self.site_weights, head=self.site, terms=self.terms, settings=self.settings,
            on_weights=self.step.weight_terms.values if self.step.weight_terms else None,
            workers=self.args.dataloader_num_workers, most_rows=self._largest_batch,
        )

    def cache_features(self) -> None:
        """Put cached activations in the place of all images (``cache_frozen_features``); done when training starts.

        Raises:
            ConfigError: an attacker that has to see the images themselves.
            DataError: rows that cannot be read, or are not the same when read twice.
            RecordError: no space on disk, or a damaged cache.
        """
        cache = self._cache
        if cache is None:
            return
        self._cache = None  # once
        self.args.remove_unused_columns = False  # the collator would drop activations: no forward has such an argument
        self.train_dataset = with_cached_rows(cache, self, "train_dataset", teacher=self.args.distillation > 0)
        self.eval_dataset = with_cached_rows(cache, self, "eval_dataset")
        mine, judged = self.harmful_task, self._outcome_meter.task
        self.harmful_task = with_cached_images(cache, mine, self.args)
        self._draw_from(None if judged is mine else with_cached_images(cache, judged, self.args))

    @property
    def _largest_batch(self) -> int:
        """Rows that go forward at once in training: as many fit where no graph is kept."""
        return max(self.args.per_device_train_batch_size, self.args.per_device_harmful_batch_size)

    def _attack_batch(self, place: int) -> dict[str, Any]:
        """Batch ``place`` of the rows that simulated attackers learn from."""
        return self._prepare_inputs(self._streams["attack"].batch(place))

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; rows that cannot be read are named, and workers get a time limit.

        What a transform reads is kept; of what it makes, the collator drops what no forward takes.
        """
        training = description == "Training"
        dataset, name = self._readable(dataset, description), "train_dataset" if training else "eval_dataset"
        rows = named(dataset, name, RowCheck(self.model, self.kind), repeat=training)
        kept, plain = self.data_collator, self._plain_collator  # a mixed image has no right answer
        self.data_collator = kept if training else where_labelled(plain) if description == "test" else plain
        try:
            loader = super()._get_dataloader(rows, description, *args, **kwargs)
        finally:
            self.data_collator = kept
        if self.args.dataloader_num_workers:
            getattr(loader, "base_dataloader", loader).timeout = self.args.dataloader_timeout
        return loader

    def _readable(self, dataset: Any, description: str) -> Any:
        """Without columns that no forward takes."""
        if hasattr(dataset, "column_names") and not has_transform(dataset) and not is_stream(dataset):
            return self._remove_unused_columns(dataset, description=description)  # knows datasets.Dataset only
        return dataset

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; a worker that fails is named."""
        with named_workers("eval_dataset", self.args.dataloader_timeout):
            return super().evaluation_loop(*args, **kwargs)

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """Train as Trainer does; first measure θ₀ for guard and balance; at the end return the guarded weights."""
        resume_from_checkpoint = checkpoint_for(resume_from_checkpoint, self.args.output_dir, self.state.global_step)
        self.cache_features()
        self._count_rows()
        with named_workers("train_dataset", self.args.dataloader_timeout):
            self._outcome_meter.start(self.bare)  # the model is θ₀ until a checkpoint is loaded
            if resume_from_checkpoint or self.args.save_strategy != "no":
                self.checkpoint_state.identity = self._identity()
                self.checkpoint_state.options = compared_options(self.args)
            if not resume_from_checkpoint:
                if self.eval_dataset is not None and self.kind != UNLABELLED:
                    self.guard.base = self._measure_base()
                self._measure_references()
                if self.args.distillation:
                    self._measure_temperature()
                set_seed(self.args.seed)  # so that measuring first changes nothing in what is trained
            with self.watch.over_steps():
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Primary micro-batches of one optimizer step, each with its harmful batch attached."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        done = self.state.global_step
        self.watch.step = done + 1
        samples = rows_of_step(samples, self._streams["harmful"], self.args, done)
        if self.attacker:
            assert self.objective is not None
            prepared = [self._prepare_inputs(sample["harmful"]) for sample in samples]
            loss = learn_attack(self.attacker, self.forwards, self.objective, self.bare, prepared, done)
            self.meter.add({"attacker_lora_loss": loss})
        every = int(self.state.logging_steps)  # a share of the run is a number of steps here
        spectra = every > 0 and (done + 1) % every == 0
        self.step.begin([partial(self._ahead, place, sample) for place, sample in enumerate(samples)], spectra=spectra)
        return samples, items

    def _ahead(self, place: int, sample: dict[str, Any]) -> Any:
        return self.forwards.ahead(self.bare, self._prepare_inputs(sample), self.state.global_step, place)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in Trainer; the last micro-batch of a step brings the gradients of the terms on weights."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.step.add_weight_gradients(self.bare, self.state.global_step)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Primary loss + distillation + λ·terms while training; the plain loss during evaluation."""
        bare = self.accelerator.unwrap_model(model)
        if not model.training or "harmful" not in inputs:
            with self.forwards.entered(bare, inputs) as plain:
                return super().compute_loss(model, plain, return_outputs=return_outputs)
        primary = {name: value for name, value in inputs.items() if name != "harmful"}
        self.forwards.hold(bare)
        draws = self.forwards.same_draws(self.state.global_step, self.step.place)
        caught = {}
        with draws if self.step.looks_ahead else contextlib.nullcontext():
            with self.forwards.side(bare, "primary") as caught["primary"]:
                with self.forwards.entered(bare, primary) as plain:
                    loss, outputs = super().compute_loss(model, plain, return_outputs=True)
            if self.objective is not None:
                with self.forwards.side(bare, "harmful") as caught["harmful"]:
                    answered = self.forwards.features(model, bare, inputs["harmful"], attacked=True)
        self.meter.add({"primary_loss": loss}, local=True)
        at = None if self.is_split else self.args.device
        total = self.args.primary_loss_weight * loss + self._keeping.loss(primary, outputs, caught["primary"], at)
        if self.objective is not None:
            # The Trainer divides by the number of micro-batches, and DDP by that of ranks.
            scale = world()[1] * self.current_gradient_accumulation_steps
            total = total + self.step.injected(self.forwards.measured(caught, inputs), scale)
            if self.is_split:
                total = total + reach([value for value in answered.values() if torch.is_tensor(value)])
        return (total, outputs) if return_outputs else total

    def _identity(self) -> dict[str, str]:
        """What a run that goes on from a checkpoint has to have in common with the one that wrote it."""
        rows = {"train_dataset": self.primary_dataset, "harmful_dataset": self.harmful_dataset,
                "eval_dataset": self._evaluated}
        rows |= {} if self.harmful_eval_dataset is None else {"harmful_eval_dataset": self.harmful_eval_dataset}
        return identity_of(self.bare, rows, self.args.dataloader_num_workers)

    def _count_rows(self) -> None:
        """Read what no column tells: the labels of harmful rows, once."""
        for task in (self.harmful_task, self._outcome_meter.task):
            task.count(workers=self.args.dataloader_num_workers)
        for stream in self._streams.values():
            stream.prepare()
        self.settings = replace(self.settings, harmful_classes=self.harmful_task.classes)
        self._outcome_meter.settings = self.settings
        if self.objective is not None:
            self.objective.settings = self.settings

    def _measure_base(self) -> float | None:
        """The guarded metric of θ₀, in points. Raises DataError where θ₀ calls the classes by other labels."""
        return measured_base(self.evaluate_aside, self._base_labels, self.bare.config, self.guard)

    def _measure_references(self) -> None:
        """G wherever a balance needs it and has none yet."""
        batches = map(self._prepare_inputs, self.get_train_dataloader())
        measure_references(self.step, self.forwards, self.bare, batches, self.compute_loss_func)

    def _measure_temperature(self) -> None:
        rows = evenly(self._readable(self.train_dataset, "Temperature"), ROWS)
        loader = DataLoader(rows, 32, collate_fn=self._plain_collator, generator=torch.Generator())
        measure_temperature(self.temperature, self.forwards, self.bare, map(self._prepare_inputs, loader))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what was measured since the last log. A log only tells: see ``Watch`` for what decides.

        A number that is not defined, as log κ of features that have collapsed to a point, is left out.
        """
        if "loss" in logs:
            means = {name: value for name, value in self.meter.drain().items() if math.isfinite(value)}
            logs = {**logs, **means, "strength": self.step.strength}
        super().log(logs, start_time)

    def _probe(self, model: nn.Module, rows: int) -> float | None:
        return self._outcome_meter.probe(model, rows)  # of cached rows once there are such

    def _judged(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, the model has the weights that would be returned now: the moving average where there is one."""
        return self.average.swapped(self.bare) if self.average else contextlib.nullcontext()

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """An evaluation during training, of the averaged weights where there are such: they are what is returned."""
        with self._judged():
            metrics = super()._evaluate(*args, **kwargs)
            if self.guarded.on:
                self.log(self._checked(metrics))
        left = self.state.max_steps - self.state.global_step
        self.guarded.set_back(self.bare, self.optimizer, self.average, left)
        return metrics

    def _checked(self, metrics: dict[str, float]) -> dict[str, float]:
        return self.guarded.check(
            self.state.global_step, points_of(metrics, self.guard.metric, "eval"), self.state.max_steps
        )

    @property
    def saved_step(self) -> int:
        """The step whose weights the model has when training has ended."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        if best is not None:
            return best
        return self.state.global_step if self.guard_record is None else self.guard_record.returned_step

    def _finish(self) -> None:
        """Give the model the weights that are returned, and say whether they are what was asked for."""
        self._refuse_ruined()
        if self.average:
            self.average.copy_to(self.bare)
        if self.guarded.on:
            if not self.guard.history or self.guard.history[-1]["step"] != self.state.global_step:
                self.log(self._checked(self.evaluate()))
            self.guard_record = self.guarded.finish(
                lambda what: points_of(self.evaluate_aside(what), self.guard.metric, what)
            )
            if self.guard_record is not None:
                self.guard_record = self.guard_record.model_copy(update={"returned_step": self.saved_step})
        self.outcome = self._outcome_meter.record(self.bare, self.guard_record)
        if self.outcome is not None:
            self.log(logged(self.outcome))
            logger.warning(self.outcome.told)
