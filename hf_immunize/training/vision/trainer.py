"""``ImmunizationTrainer``: binds objective, weights, guard and the harmful stream to ``transformers.Trainer``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed
from transformers.utils import logging

from hf_immunize.data import NamedRows, collate_pixels, has_transform, named_workers, output_names
from hf_immunize.errors import ConfigError
from hf_immunize.features import Captured, capture_inputs
from hf_immunize.models import refuse_below_float32, refuse_non_finite
from hf_immunize.records import OutcomeRecord
from hf_immunize.training.core.average import WeightAverage
from hf_immunize.training.core.distributed import mean_over_ranks
from hf_immunize.training.core.guard import UtilityGuard
from hf_immunize.training.core.meter import Meter
from hf_immunize.training.core.objective import GlobalObjective
from hf_immunize.training.core.sharding import reach
from hf_immunize.training.core.terms import TermSettings, terms_of
from hf_immunize.training.core.watch import Watch
from hf_immunize.training.vision.checkpointing import StrictCheckpointMixin
from hf_immunize.training.vision.checks import check_data, check_harmful, check_unlabelled, head_of, matched
from hf_immunize.training.vision.config import ImmunizationConfig
from hf_immunize.training.vision.distillation import feature_distance
from hf_immunize.training.vision.frozen import (
    BoundaryDataset,
    FeatureCache,
    FrozenPart,
    collate_with_boundary,
    freeze_all_but,
)
from hf_immunize.training.vision.guarding import GuardedMixin
from hf_immunize.training.vision.harmful_stream import HarmfulStream
from hf_immunize.training.vision.lora_attacker import LoraAttacker
from hf_immunize.training.vision.norms import frozen_statistics
from hf_immunize.training.vision.outcome import OutcomeMeter
from hf_immunize.training.vision.preconditioning import Preconditioner
from hf_immunize.training.vision.primary import (
    METRICS,
    REGRESSION,
    SINGLE,
    UNLABELLED,
    BaseLabels,
    accuracy,
    check_primary_labels,
    collate_with_labels,
    divergence,
)
from hf_immunize.training.vision.publishing import GatedPushMixin
from hf_immunize.training.vision.sharded import ShardedMixin, resumable
from hf_immunize.training.vision.sites import choose_layouts, choose_sites
from hf_immunize.training.vision.steps import StepMixin
from hf_immunize.training.vision.support import refuse_accelerator, refuse_model, refuse_sharded, refuse_terms

logger = logging.get_logger(__name__)


class _Averaging(TrainerCallback):
    """Takes each optimizer step's weights into the moving average."""

    def __init__(self, average: WeightAverage, bare: Callable[[], nn.Module]):
        self._average, self._bare = average, bare

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After ``optimizer.step()``."""
        self._average.update(self._bare())


class _Watching(TrainerCallback):
    """Stops a run whose numbers are not finite, however rarely it logs."""

    def __init__(self, watch: Watch):
        self._watch = watch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After every optimizer step; values are read when that costs nothing, or has waited long enough."""
        if self._watch.is_due:
            self._watch.settle()


class ImmunizationTrainer(GatedPushMixin, StrictCheckpointMixin, GuardedMixin, StepMixin, ShardedMixin, Trainer):
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
        train_dataset: primary rows with ``pixel_values`` and the ``labels`` of the model's own task, if it has any.
        harmful_dataset: harmful rows of the same shape; labels are the attacker's classes.
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
        refuse_model(args, model)
        refuse_non_finite(model, "the model before immunization")
        if args.max_primary_drop is not None and eval_dataset is None:
            raise ConfigError("expected an eval_dataset for max_primary_drop, got none: pass held-out primary rows.")
        if args.trainable_modules is not None:
            freeze_all_but(model, args.trainable_modules)
        refuse_below_float32(model, "the model")
        self.site = head_of(model, args)
        train_dataset, eval_dataset = matched(model, train_dataset), matched(model, eval_dataset)
        self.kind, *labels = check_data(model, train_dataset, harmful_dataset, eval_dataset)
        if self.kind == UNLABELLED:
            check_unlabelled(model, args, train_dataset, self.site)
        sample = torch.as_tensor(train_dataset[0]["pixel_values"])
        self.harmful_dataset, self.primary_dataset = harmful_dataset, train_dataset
        self.harmful_eval_dataset = harmful_eval_dataset
        held = None if harmful_eval_dataset is None else check_harmful(harmful_eval_dataset, "harmful_eval_dataset")
        self._choose_sites(model, args, train_dataset[0])
        self._set_up(model, args, sample, max(labels[1]) + 1)
        self._base_labels = BaseLabels(compute_metrics or accuracy) if self.kind == SINGLE else None
        plain = data_collator or collate_with_labels(collate_pixels, self.kind)
        with resumable(args, model):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                data_collator=collate_with_boundary(plain),
                compute_metrics=self._base_labels or compute_metrics or METRICS[self.kind],
                **kwargs,
            )
        refuse_accelerator(self.accelerator)
        # The loss is a per-batch mean; without both lines the stock Trainer multiplies it by world x accumulation
        # for models that accept loss kwargs.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        harmful = self._set_up_rest(model, data_collator, *labels)
        self._outcome_meter = self._make_outcome(harmful, labels[1], held)

    def _choose_sites(self, model: nn.Module, args: ImmunizationConfig, row: dict[str, Any]) -> None:
        """Sites with their weights, and how an input there, or at the head, becomes one row per image."""
        sample = torch.as_tensor(row["pixel_values"])
        self.site_weights = choose_sites(model, args.sites, args.site_weights, self.site, sample)
        self.layouts = choose_layouts(model, [*self.site_weights, self.site], args.site_layouts, row)

    def _set_up(self, model: nn.Module, args: ImmunizationConfig, sample: Tensor, harmful_classes: int) -> None:
        """Everything of ours that Trainer's own constructor does not need to have run for."""
        terms = terms_of(args.objective)
        refuse_terms(args, terms)
        metric = "r2" if self.kind == REGRESSION and args.guard_metric == "accuracy" else args.guard_metric
        self.guard = UtilityGuard(args.max_primary_drop, metric, args.max_strength_factor)
        self.watch = Watch(terms)
        self.meter = Meter(self.watch)
        self.frozen = FrozenPart(model, sample.shape)
        self.objective = GlobalObjective(
            terms,
            TermSettings(
                horizons=args.horizons,
                memorization=args.memorization,
                group_rows=args.harmful_group_rows,
                attacker_steps=args.attacker_steps,
                harmful_classes=harmful_classes,
            ),
            self.site_weights,
            weight=args.weight,
            strength=args.strength,
            shares=args.term_shares,
            bank_rows=args.feature_bank_rows,
            meter=self.meter,
        )
        self.preconditioner = (
            Preconditioner(model, args.precondition_gradients, args.precondition_ridge)
            if args.precondition_gradients
            else None
        )
        self._planned = None
        self._place = 0
        self.guard_record = None
        self.outcome: OutcomeRecord | None = None
        """Whether it worked; set when training ends."""

    def _set_up_rest(self, model: nn.Module, collator: Any, primary_labels: Any, harmful_labels: list[int]) -> Any:
        """What needs Trainer's own constructor to have run: devices, callbacks, precision."""
        args = self.args
        guarded = args.max_primary_drop is not None
        asked = args.feature_distillation > 0 or (args.distillation > 0 and not args.cache_frozen_features)
        self.teacher = self._frozen_copy() if asked else None
        self.split(self.teacher)
        refuse_sharded(args, model)
        self._initial = {k: v.cpu().clone() for k, v in model.state_dict().items()} if guarded else None
        self.add_callback(_Watching(self.watch))
        self.average = WeightAverage(model, args.ema_decay) if args.ema_decay else None
        if self.average:
            self.add_callback(_Averaging(self.average, lambda: self.accelerator.unwrap_model(self.model)))
        harmful, self._cache = self.harmful_dataset, None
        if args.cache_frozen_features:
            harmful = self._use_cache(model, collator, primary_labels, harmful_labels)
        self.trained_on = {"primary": self.train_dataset, "harmful": harmful}
        self._harmful = self._stream(harmful, harmful_labels)
        self.attacker = None
        if args.attacker_lora_rank:
            rank, rate = args.attacker_lora_rank, args.attacker_lora_rate
            self.attacker = LoraAttacker(model, self.site, rank=rank, rate=rate, seed=args.seed)
        return harmful

    def _make_outcome(self, harmful: Any, labels: list[int], held: list[int] | None) -> OutcomeMeter:
        """Measures the held-out harmful rows, or those that are trained on."""
        rows = harmful
        if held is not None:
            rows = self.harmful_eval_dataset
            if self._cache is not None:
                rows = self._cache.dataset(rows, held, "harmful_eval_dataset")
        return OutcomeMeter(
            NamedRows(rows, "harmful_dataset" if held is None else "harmful_eval_dataset"),
            labels if held is None else held,
            held_out=held is not None, collate=self.data_collator, capture=self._capture_rows,
            sites={site: weights.site_share for site, weights in self.objective.weights.items()}, head=self.site,
            terms=self.objective.terms, settings=self.objective.settings,
        )

    def _capture_rows(self, model: nn.Module, batch: dict[str, Any]) -> Captured:
        """Inputs of the sites and of the head in one forward of harmful rows."""
        batch = self._prepare_inputs(batch)
        names = {name: self.layouts.get(name) for name in dict.fromkeys([*self.objective.sites, self.site])}
        with self.compute_loss_context_manager(), capture_inputs(model, names) as caught:
            self._forward(model, batch)
        return caught

    def _use_cache(self, model: nn.Module, collator: Any, primary_labels: Any, harmful_labels: list[int]) -> Any:
        """Put cached activations in the place of all images; returns the harmful rows."""
        if collator is not None:
            raise ConfigError(
                "expected no data_collator of your own with cache_frozen_features, got one: it would be run once and "
                "for all. Preprocess in the dataset, or turn the cache off."
            )
        if self.frozen.boundary is None:
            raise ConfigError(
                "expected a frozen part that can be skipped for cache_frozen_features, got none: name what is trained "
                "with trainable_modules (e.g. 'last:1'), or turn the cache off."
            )
        self.args.remove_unused_columns = False  # the collator would drop activations: no forward has such an argument
        cache = FeatureCache(
            self.args.feature_cache_dir,
            model,
            self.frozen.boundary,
            collate_with_labels(collate_pixels, self.kind),
            str(self.accelerator.mixed_precision),
            self.compute_loss_context_manager,
        )
        teacher = self.args.distillation > 0
        self.train_dataset = cache.dataset(self.train_dataset, primary_labels, "train_dataset", teacher=teacher)
        if self.eval_dataset is not None:
            labels = check_primary_labels(model, self.eval_dataset, self.kind)
            self.eval_dataset = cache.dataset(self.eval_dataset, labels, "eval_dataset")
        self._cache = cache
        return cache.dataset(self.harmful_dataset, harmful_labels, "harmful_dataset")

    def _stream(self, dataset: Any, labels: list[int]) -> HarmfulStream:
        args = self.args
        return HarmfulStream(
            dataset,
            labels,
            self.data_collator,
            rows_per_device=args.per_device_harmful_batch_size,
            classes_per_batch=args.harmful_classes_per_batch,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            rank=args.process_index,
            world_size=args.world_size,
            workers=args.dataloader_num_workers,
            timeout=args.dataloader_timeout,
        )

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; rows that cannot be read are named, and workers get a time limit.

        What a transform reads is kept; of what it makes, the collator drops what no forward takes.
        """
        if hasattr(dataset, "column_names") and not has_transform(dataset):
            dataset = self._remove_unused_columns(dataset, description=description)  # knows datasets.Dataset only
        name = "train_dataset" if description == "Training" else "eval_dataset"
        loader = super()._get_dataloader(NamedRows(dataset, name), description, *args, **kwargs)
        if self.args.dataloader_num_workers:
            getattr(loader, "base_dataloader", loader).timeout = self.args.dataloader_timeout
        return loader

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; a worker that fails is named."""
        with named_workers("eval_dataset", self.args.dataloader_timeout):
            return super().evaluation_loop(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as Trainer does; first measure θ₀ for guard and balance; at the end return the guarded weights."""
        with named_workers("train_dataset", self.args.dataloader_timeout):
            self._outcome_meter.start(self.accelerator.unwrap_model(self.model))  # the model is θ₀ until it is loaded
            if not resume_from_checkpoint:
                if self.eval_dataset is not None and self.kind != UNLABELLED:
                    self.guard.base = self._measure_base()
                self._measure_references()
                set_seed(self.args.seed)  # so that measuring first changes nothing in what is trained
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self._finish()
        return output

    def _measure_base(self) -> float:
        """The guarded metric of θ₀, in points. Raises DataError where θ₀ calls the classes by other labels."""
        if self._base_labels is None:
            return self._metric_points(self.evaluate(metric_key_prefix="base"), "base")
        self._base_labels.open = True
        points = self._metric_points(self.evaluate(metric_key_prefix="base"), "base")
        config = self.accelerator.unwrap_model(self.model).config
        self._base_labels.refuse_other_order(output_names(config.id2label), "eval_dataset")
        return points

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
            with self._entered(bare, inputs) as plain:
                return super().compute_loss(model, plain, return_outputs=return_outputs)
        harmful = inputs["harmful"]
        primary = {name: value for name, value in inputs.items() if name != "harmful"}
        self.frozen.hold(bare)
        place = self._micro_batch()
        with self._same_draws(place) if self._planned is not None else contextlib.nullcontext():
            with frozen_statistics(bare, every=self.args.freeze_norm_statistics), self._watched(bare) as caught_primary:
                with self._entered(bare, primary) as plain:
                    loss, outputs = super().compute_loss(model, plain, return_outputs=True)
            with frozen_statistics(bare, every=True), self._watched(bare) as caught_harmful:
                answered = self._forward(model, harmful, attacked=True)
        caught = {"primary": caught_primary, "harmful": caught_harmful}
        plan = self._planned[place] if self._planned is not None else self._plan_of([self._micro(caught, inputs)])[0]
        self.meter.add({"primary_loss": mean_over_ranks(loss)})
        total = self.args.primary_loss_weight * loss + self._distill(primary, outputs, caught_primary)
        total = total + self._inject(caught, plan)
        if self.is_split:
            total = total + reach([value for value in answered.values() if torch.is_tensor(value)])
        return (total, outputs) if return_outputs else total

    @contextlib.contextmanager
    def _entered(self, bare: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Inputs of a forward: pixels, or a placeholder where it starts at cached activations; float targets."""
        with self.frozen.entered(bare, inputs) as plain:
            if self.kind == REGRESSION and "labels" in plain:
                plain = plain | {"labels": plain["labels"].float()}
            yield plain

    def _distill(self, primary: dict[str, Any], outputs: Any, caught: Captured) -> Tensor | float:
        """What keeps the model near θ₀ on primary rows: divergence of its outputs and distance of its features."""
        target, features = primary.get("teacher_logits"), None
        if self.teacher is not None:
            if not self.is_split:
                self.teacher.to(next(self.model.parameters()).device)
            head = {self.site: self.layouts[self.site]}
            with torch.no_grad(), capture_inputs(self.teacher, head) as teacher:
                with self.frozen.entered(self.teacher, primary) as plain:
                    theirs = self.teacher(**{name: part for name, part in plain.items() if name != "labels"})
            target, features = theirs.get("logits"), teacher[self.site]
        total: Tensor | float = 0.0
        if self.args.distillation:
            distance = divergence(outputs["logits"], target.to(outputs["logits"].dtype), self.kind)
            self.meter.add({"distillation": mean_over_ranks(distance)})
            total = total + self.args.distillation * distance
        if features is not None and self.args.feature_distillation:
            distance = feature_distance(caught[self.site], features)
            self.meter.add({"feature_distillation": mean_over_ranks(distance)})
            total = total + self.args.feature_distillation * distance
        return total


__all__ = ["BoundaryDataset", "ImmunizationTrainer"]
