"""``ImmunizationTrainer``: binds objective, weights, guard and the harmful stream to ``transformers.Trainer``."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.utils import logging

from hf_immunize.data import check_label_range, check_sample, collate_pixels, labels_of
from hf_immunize.errors import ConfigError, DataError, TrainingDivergedError
from hf_immunize.features import capture_inputs, find_classifier
from hf_immunize.training.balancing import TermWeights
from hf_immunize.training.checkpointing import StrictCheckpointMixin
from hf_immunize.training.config import ImmunizationConfig
from hf_immunize.training.distributed import gather_rows, mean_over_ranks, world
from hf_immunize.training.guard import UtilityGuard
from hf_immunize.training.harmful_stream import HarmfulStream
from hf_immunize.training.meter import Meter
from hf_immunize.training.norms import frozen_statistics
from hf_immunize.training.objective import Evaluated, Rows, TermSettings, evaluate_terms, terms_of
from hf_immunize.training.publishing import GatedPushMixin

logger = logging.get_logger(__name__)


def accuracy(prediction: Any) -> dict[str, float]:
    """Default ``compute_metrics``: the share of rows whose largest logit is the label (0..1)."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float(np.mean(np.argmax(logits, axis=-1) == prediction.label_ids))}


class ImmunizationTrainer(GatedPushMixin, StrictCheckpointMixin, Trainer):
    """A ``Trainer`` that immunizes: primary loss + λ·terms on features of primary and harmful rows.

    Used as any Trainer, plus ``harmful_dataset``. The model passed in is θ₀: distillation and the utility guard
    compare with it, also when training resumes from a checkpoint.

    Spectra and the closed-form adversary are those of the *global* batch: rows of all ranks and of all micro-batches
    of one optimizer step. With gradient accumulation the features of the step are computed twice, first without
    gradient for all micro-batches together, then with gradient for each, so that accumulating gives the gradient
    of one large batch exactly.

    Args:
        model: an image classifier of transformers with a linear head.
        args: ImmunizationConfig.
        train_dataset: primary rows with ``pixel_values`` and ``labels``.
        harmful_dataset: harmful rows of the same shape; labels are the attacker's classes.
        eval_dataset, processing_class, data_collator, compute_metrics, …: as in Trainer. ``compute_metrics`` defaults
            to accuracy.

    Raises:
        DataError: an empty dataset, missing columns, images of another size, labels outside their range.
        ConfigError: options that contradict each other or the set-up.
        ModelError: no linear head found.
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
        **kwargs: Any,
    ):
        self.site = args.feature_module or find_classifier(model)
        with capture_inputs(model, [self.site]):
            pass  # raises for a name the model does not have
        harmful_labels = self._check_data(model, train_dataset, harmful_dataset)
        if args.max_primary_drop is not None and eval_dataset is None:
            raise ConfigError("expected an eval_dataset for max_primary_drop, got none: pass held-out primary rows.")
        self.harmful_dataset = harmful_dataset
        self.terms = terms_of(args.objective)
        self.weights = TermWeights(self.terms, args.weight, args.strength, args.term_shares)
        self.guard = UtilityGuard(args.max_primary_drop, args.guard_metric, args.max_strength_factor)
        self.meter = Meter()
        self._settings = TermSettings(args.horizon, args.memorization, args.harmful_group_rows)
        self._planned: list[dict[str, Tensor]] | None = None
        self._place = 0
        self._progress: dict[str, list[float]] = {}
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator or collate_pixels,
            compute_metrics=compute_metrics or accuracy,
            **kwargs,
        )
        # The loss is a per-batch mean; without both lines the stock Trainer multiplies it by world x accumulation
        # for models that accept loss kwargs.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        if self.args.n_gpu > 1:
            raise ConfigError("expected one device per process, got DataParallel: start with `accelerate launch`.")
        guarded = args.max_primary_drop is not None
        self._initial = {k: v.cpu().clone() for k, v in model.state_dict().items()} if guarded else None
        self.teacher = self._frozen_copy() if args.distillation > 0 else None
        self._harmful = HarmfulStream(
            harmful_dataset,
            harmful_labels,
            self.data_collator,
            rows_per_device=args.per_device_harmful_batch_size,
            classes_per_batch=args.harmful_classes_per_batch,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            workers=args.dataloader_num_workers,
        )

    @staticmethod
    def _check_data(model: nn.Module, primary: Any, harmful: Any) -> list[int]:
        """The harmful labels, once everything about both datasets that can be checked beforehand has been."""
        if primary is None or harmful is None:
            missing = "train_dataset" if primary is None else "harmful_dataset"
            raise DataError(f"expected a train_dataset and a harmful_dataset, got no {missing}.")
        check_label_range(labels_of(primary, "train_dataset"), model.config.num_labels, "train_dataset")
        harmful_labels = labels_of(harmful, "harmful_dataset")
        check_label_range(harmful_labels, max(harmful_labels) + 1, "harmful_dataset")
        shapes = check_sample(primary, "train_dataset"), check_sample(harmful, "harmful_dataset")
        if shapes[0] != shapes[1]:
            raise DataError(
                f"expected harmful images of the primary images' size {tuple(shapes[0])}, got {tuple(shapes[1])}: "
                "preprocess both with the same image processor."
            )
        return harmful_labels

    def _frozen_copy(self) -> nn.Module:
        teacher = copy.deepcopy(self.accelerator.unwrap_model(self.model))
        return teacher.requires_grad_(False).eval()

    # ---- training -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as Trainer does; first measure θ₀ for guard and balance; at the end return the guarded weights."""
        if not resume_from_checkpoint:
            if self.eval_dataset is not None:
                self.guard.base = self._metric_points(self.evaluate(metric_key_prefix="base"), "base")
            if self.weights.needs_reference:
                self.weights.reference = self._reference_gradient()
            set_seed(self.args.seed)  # so that measuring first changes nothing in what is trained
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.guard.base is not None:
            self._finish_guard()
        return output

    def _reference_gradient(self, batches: int = 8) -> Tensor:
        """G: norm of the primary loss's gradient at the features with every label wrong; mean over a few batches."""
        model = self.accelerator.unwrap_model(self.model)
        norms = []
        for place, inputs in enumerate(self.get_train_dataloader()):
            if place == batches:
                break
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), capture_inputs(model, [self.site]) as caught:
                model.eval()
                model(pixel_values=inputs["pixel_values"])
            features = caught[self.site].detach().requires_grad_()
            head = model.get_submodule(self.site)
            wrong = (inputs["labels"] + 1) % model.config.num_labels
            with torch.enable_grad():
                loss = functional.cross_entropy(head(features), wrong)
            (gradient,) = torch.autograd.grad(loss, features)
            everywhere, _ = gather_rows(gradient)
            # Each rank's loss is a mean over its own rows; the global mean divides by the number of ranks as well.
            norms.append(torch.linalg.vector_norm(everywhere.double()) / world()[1])
        return torch.stack(norms).mean()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Primary micro-batches of one optimizer step, each with its harmful batch attached."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        first = self.state.global_step * self.args.gradient_accumulation_steps
        samples = [{**sample, "harmful": self._harmful.batch(first + i)} for i, sample in enumerate(samples)]
        self._planned = self._plan(samples) if len(samples) > 1 else None
        return samples, items

    def _plan(self, samples: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Gradients at the features of every micro-batch, from one evaluation on all of them together."""
        model = self.accelerator.unwrap_model(self.model)
        model.train()
        pairs = []
        with torch.no_grad(), frozen_statistics(model, every=True):
            for place, sample in enumerate(samples):
                sample = self._prepare_inputs(sample)
                with self._same_draws(place), self.compute_loss_context_manager():
                    pairs.append(
                        {
                            "primary": (self._features(model, sample), sample["labels"]),
                            "harmful": (self._features(model, sample["harmful"]), sample["harmful"]["labels"]),
                        }
                    )
        return self._feature_gradients(pairs)

    @contextlib.contextmanager
    def _same_draws(self, place: int) -> Iterator[None]:
        """Both passes over a micro-batch draw the same dropout masks: a generator state derived from the step."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            step = self.state.global_step * self.args.gradient_accumulation_steps + place
            torch.manual_seed((self.args.seed * 1_000_003 + step) * 1_009 + self.args.process_index)
            yield

    def _features(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        with capture_inputs(self.accelerator.unwrap_model(self.model), [self.site]) as caught:
            model(pixel_values=inputs["pixel_values"])
        return caught[self.site]

    def _feature_gradients(self, pairs: list[dict[str, tuple[Tensor, Tensor]]]) -> list[dict[str, Tensor]]:
        """λ-weighted gradient at this rank's features, for each micro-batch and side."""
        rows, places = {}, {}
        for side in ("primary", "harmful"):
            parts = [(gather_rows(pair[side][0]), gather_rows(pair[side][1])[0]) for pair in pairs]
            starts = np.cumsum([0] + [len(labels) for _, labels in parts])
            features = torch.cat([gathered for (gathered, _), _ in parts])
            rows[side] = Rows(features, torch.cat([labels for _, labels in parts]))
            places[side] = [mine + int(start) for ((_, mine), _), start in zip(parts, starts, strict=False)]
        evaluated = evaluate_terms(self.terms, rows, self._settings)
        lambdas = self.weights.update(evaluated.gradients)
        self._observe(evaluated, lambdas)
        summed = {side: torch.zeros_like(evaluated.rows[side].features) for side in rows}
        for term in self.terms:
            summed[term.side] = summed[term.side] + lambdas[term.name] * evaluated.gradients[term.name]
        return [{side: summed[side][places[side][i]] for side in rows} for i in range(len(pairs))]

    def _observe(self, evaluated: Evaluated, lambdas: dict[str, Tensor]) -> None:
        """Keep values for the log; spectra are added on steps that will be logged."""
        self.meter.add({f"{name}": value for name, value in evaluated.values.items()})
        self.meter.add({f"lambda/{name}": value for name, value in lambdas.items()})
        every = self.args.logging_steps
        if every and (self.state.global_step + 1) % max(int(every), 1) == 0:
            for side, rows in evaluated.rows.items():
                spectrum = rows.spectrum
                self.meter.add(
                    {
                        f"{side}_log_kappa": spectrum.log_condition.detach(),
                        f"{side}_effective_rank": spectrum.effective_rank.detach(),
                    }
                )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Primary loss + distillation + λ·terms while training; the plain loss during evaluation."""
        if not model.training or "harmful" not in inputs:
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        harmful = inputs["harmful"]
        primary = {name: value for name, value in inputs.items() if name != "harmful"}
        bare = self.accelerator.unwrap_model(model)
        place = self._micro_batch()
        with self._same_draws(place) if self._planned is not None else contextlib.nullcontext():
            with frozen_statistics(bare, every=self.args.freeze_norm_statistics):
                with capture_inputs(bare, [self.site]) as caught:
                    loss, outputs = super().compute_loss(model, dict(primary), return_outputs=True)
                features = {"primary": caught[self.site]}
            with frozen_statistics(bare, every=True):
                features["harmful"] = self._features(model, harmful)
        total = self.args.primary_loss_weight * loss + self._distill(primary, outputs)
        if self._planned is None:
            pairs = {
                "primary": (features["primary"], primary["labels"]),
                "harmful": (features["harmful"], harmful["labels"]),
            }
            gradients = self._feature_gradients([pairs])[0]
        else:
            gradients = self._planned[place]
        self.meter.add({"primary_loss": mean_over_ranks(loss)})
        total = total + self._inject(features, gradients)
        return (total, outputs) if return_outputs else total

    def _micro_batch(self) -> int:
        """Which micro-batch of the current optimizer step this is, counting from 0."""
        if self._planned is None:
            return 0
        place = self._place
        self._place = (place + 1) % len(self._planned)
        return place

    def _inject(self, features: dict[str, Tensor], gradients: dict[str, Tensor]) -> Tensor:
        """A scalar of value zero whose gradient at the features is the objective's.

        The Trainer divides by the number of micro-batches and DDP by the number of ranks, as suits a mean over rows.
        The objective is one number of the whole global batch, so both are multiplied back.
        """
        scale = world()[1] * self.current_gradient_accumulation_steps
        total: Tensor | int = 0
        for side, captured in features.items():
            product = (captured * (scale * gradients[side]).to(captured)).sum()
            total = total + product - product.detach()
        return total

    def _distill(self, primary: dict[str, Any], outputs: Any) -> Tensor | float:
        if self.teacher is None:
            return 0.0
        with torch.no_grad():
            self.teacher.to(primary["pixel_values"].device)
            target = self.teacher(pixel_values=primary["pixel_values"]).logits
        divergence = functional.kl_div(
            outputs["logits"].log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        self.meter.add({"distillation": mean_over_ranks(divergence)})
        return self.args.distillation * divergence

    # ---- logging and the guard ------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what was measured since the last log; stop on anything that is not finite."""
        if "loss" in logs:
            means = self.meter.drain()
            for term in self.terms:
                if term.name in means:
                    self._progress.setdefault(term.name, []).append(means[term.name])
            logs = {**logs, **means, "strength": self.weights.strength * self.weights.factor}
            broken = sorted(key for key, value in logs.items() if isinstance(value, float) and not math.isfinite(value))
            if broken and not self.args.logging_nan_inf_filter:
                raise TrainingDivergedError(
                    f"expected finite losses and spectra, got {broken} at step {self.state.global_step}: lower the "
                    "learning rate or the strength, and check the images for constant or broken ones."
                )
        super().log(logs, start_time)

    def _metric_points(self, metrics: dict[str, float], prefix: str = "eval") -> float:
        key = f"{prefix}_{self.args.guard_metric}"
        if key not in metrics:
            raise ConfigError(f"expected metric {self.args.guard_metric!r} in {sorted(metrics)}: set guard_metric.")
        return 100.0 * metrics[key]

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super()._evaluate(*args, **kwargs)
        if self.guard.base is not None:
            self._guard_step(metrics)
        return metrics

    def _guard_step(self, metrics: dict[str, float]) -> None:
        recent = [term.progress(value[-1]) for term in self.terms if (value := self._progress.get(term.name))]
        progress = sum(recent) if recent else float("inf")
        bare = self.accelerator.unwrap_model(self.model)
        points = self._metric_points(metrics)
        self.weights.factor = self.guard.observe(
            self.state.global_step, points, progress, self.weights.factor, bare
        )
        self.log({"primary_drop": self.guard.base - points, "strength_factor": self.weights.factor})

    def _finish_guard(self) -> None:
        if not self.guard.history or self.guard.history[-1]["step"] != self.state.global_step:
            self._guard_step(self.evaluate())
        bare = self.accelerator.unwrap_model(self.model)
        if self.guard.allowed is not None and not self.guard.choose(bare):
            bare.load_state_dict(self._initial, strict=True)
            logger.warning(
                f"max_primary_drop={self.guard.allowed} was not held at any evaluation: the weights from before "
                "immunization are returned. Lower the strength, add distillation, or train longer."
            )
        final = self._metric_points(self.evaluate(metric_key_prefix="final"), "final")
        self.guard_record = self.guard.record(final)
