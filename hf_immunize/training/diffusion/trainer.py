"""The loop: retain loss, feature terms, simulated attack, guard. It binds; the formulas live in other files."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_immunize.data.fingerprint import digest_tensor
from hf_immunize.diffusion import (
    DenoisingExam,
    LatentDataset,
    NoiseProcess,
    denoiser_of,
    denoising_losses,
    dtype_of_rows,
    fits_memory,
    schedule_of,
)
from hf_immunize.errors import ConfigError, TrainingDivergedError
from hf_immunize.features import capture_inputs
from hf_immunize.models import DIVERGED, refuse_non_finite
from hf_immunize.records import OutcomeRecord, UtilityGuardRecord
from hf_immunize.training.core.average import WeightAverage
from hf_immunize.training.core.changing import ChangingPart
from hf_immunize.training.core.distributed import world
from hf_immunize.training.core.draws import same_draws
from hf_immunize.training.core.guard import UtilityGuard
from hf_immunize.training.core.guarded import GuardedRun
from hf_immunize.training.core.launching import sharding_plugin
from hf_immunize.training.core.measured import Side
from hf_immunize.training.core.meter import Meter
from hf_immunize.training.core.objective import MicroBatch
from hf_immunize.training.core.sharding import original_class, reach, reduced_later, settle, shard, whole, whole_copy
from hf_immunize.training.core.state import CheckpointState, Stateful
from hf_immunize.training.core.step import Measured
from hf_immunize.training.core.teacher import Teacher
from hf_immunize.training.core.watch import Watch
from hf_immunize.training.diffusion.checkpoint import (
    HELD,
    check_options,
    load_loop,
    prune_checkpoints,
    save_loop,
    unmark,
)
from hf_immunize.training.diffusion.config import DiffusionImmunizationConfig, scientific_options
from hf_immunize.training.diffusion.draws import share_draws, unshare_draws
from hf_immunize.training.diffusion.factors import NOTABLE, merge_factors, told_rounding
from hf_immunize.training.diffusion.optimizers import optimizer_of, weights_to_judge
from hf_immunize.training.diffusion.outcome import MOST_ROWS, ConceptOutcome
from hf_immunize.training.diffusion.references import WrongTargetGradients, wrong_targets
from hf_immunize.training.diffusion.setup import (
    Streams,
    accelerator_of,
    build_step,
    check_data,
    choose_trainable,
    named_terms,
    told_conditions,
)
from hf_immunize.training.diffusion.stream import NoisyBatch, NoisyStream

GUARD_METRIC = "retain denoising loss, -100 ln"
"""Points of the guard: 100·ln of the loss's factor, which is close to percent."""
_REFERENCE_BATCHES = 4
_SMALLER = (
    "lower per_device_train_batch_size or per_device_harmful_batch_size (raise gradient_accumulation_steps) or "
    "eval_batch_size, set gradient_checkpointing or mixed_precision=bf16"
)
_LARGER = "take trainable_modules=lora (with attacker_rank above 0), fewer sites, distillation=0 or a larger device"


class DiffusionImmunizationTrainer:
    """Immunizes a denoiser against learning what ``harmful_dataset`` shows, and keeps what ``train_dataset`` shows.

    Args:
        model: a bare denoiser of a class in ``hf_immunize.diffusion.DENOISERS``.
        scheduler: the diffusers scheduler it belongs to, or a NoiseProcess.
        args: options.
        train_dataset: rows of what the model keeps.
        harmful_dataset: rows of the concept, those that the defender has.
        eval_dataset: held-out retain rows for the guard.
        harmful_eval_dataset: rows of the concept that are not trained on, by which ``outcome`` says whether it worked;
            those of ``harmful_dataset`` without them.
        null_conditions: what the denoiser is told of no prompt, one row by condition, for ``attacker_conditions`` none
            and for esd; a denoiser that is told classes needs none.
        validate: called with the bare model and the step every ``validation_steps``, e.g. to draw images with a fixed
            seed; on the main process only, in evaluation mode.
        before_update: called with this trainer after each step's gradients are complete.

    Raises:
        ModelError, DataError, ConfigError: see their messages.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        args: DiffusionImmunizationConfig,
        *,
        train_dataset: LatentDataset,
        harmful_dataset: LatentDataset,
        eval_dataset: LatentDataset | None = None,
        harmful_eval_dataset: LatentDataset | None = None,
        null_conditions: Mapping[str, Tensor] | None = None,
        validate: Callable[[nn.Module, int], None] | None = None,
        before_update: Callable[[DiffusionImmunizationTrainer], None] | None = None,
    ):
        self.args, self.denoiser = args, denoiser_of(model)
        self.process = scheduler if isinstance(scheduler, NoiseProcess) else NoiseProcess.from_scheduler(scheduler)
        self.accelerator = accelerator_of(args)
        self._validate, self._before_update = validate, before_update
        self._rows = {"train_dataset": train_dataset, "harmful_dataset": harmful_dataset, "eval_dataset": eval_dataset}
        self._rows[HELD] = harmful_eval_dataset
        with fits_memory("model, optimizer and the copies that the objective needs", _LARGER):
            self._build(model, train_dataset, harmful_dataset, eval_dataset, harmful_eval_dataset, null_conditions)
            self._outcome_meter = self._make_outcome(harmful_dataset, harmful_eval_dataset)
        self.outcome: OutcomeRecord | None = None
        self.step = 0
        self.merge_rounding = 0.0
        """Share of the LoRA update that merging into narrower weights took."""
        self.log_history: list[dict[str, float]] = []

    def _build(
        self, model: nn.Module, train_dataset: LatentDataset, harmful_dataset: LatentDataset,
        eval_dataset: LatentDataset | None, held: LatentDataset | None, null: Mapping[str, Tensor] | None,
    ) -> None:
        args = self.args
        plugin = sharding_plugin() if world()[1] > 1 else None
        self.bare: Any = model.to(self.accelerator.device)
        check_data(self.denoiser, model, args, train_dataset, harmful_dataset, eval_dataset, held)
        self._asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        choose_trainable(self.denoiser, model.train(), args.trainable_modules, args.lora_rank)
        if args.gradient_checkpointing:
            enable: Any = self.bare.enable_gradient_checkpointing
            enable()
        share_draws(self.bare)
        self.streams = Streams.of(args, self.process, train_dataset, harmful_dataset)
        self.watch = Watch(named_terms(args))
        self.meter = Meter(self.watch)
        told = told_conditions(args, self.bare, train_dataset, harmful_dataset, null)
        self.terms, self.layouts = build_step(args, self.denoiser, self.bare, self.streams, self.meter, *told)
        self._teacher = None
        if args.distillation > 0:
            if plugin is not None:
                self.bare.to("cpu")  # a device need not hold two whole models
            self._teacher = Teacher(self.bare, self.accelerator.autocast, share=plugin is None)
        self.is_split = self._split(plugin)
        self.changing = ChangingPart(self.bare)
        self._make_guard(harmful_dataset, eval_dataset)
        self._make_optimizer()
        parts: dict[str, Stateful | None] = {"terms": self.terms, "meter": self.meter, "average": self.average}
        self._state = CheckpointState(parts, self.guard, self.watch)
        if self.is_split:  # nothing to wrap: autocast, if that was asked for
            self.model = self.accelerator.prepare_model(self.bare, device_placement=False, evaluation_mode=True)
        else:
            self.model = self.accelerator.prepare(self.bare)

    def _make_guard(self, harmful: LatentDataset, evaluation: LatentDataset | None) -> None:
        drop = self.args.max_primary_drop
        allowed = None if drop is None else 100 * math.log1p(drop / 100)
        self.guard = UtilityGuard(allowed, GUARD_METRIC, self.args.max_strength_factor)
        self._guarded = GuardedRun(self.guard, self.watch, self.terms, self.changing, f"max_primary_drop={drop}")
        self.guard_record: UtilityGuardRecord | None = None
        self._asking: dict[str, Any] = {"seed": self.args.seed, "batch_size": self.args.eval_batch_size}
        self._exam = DenoisingExam(self.process, evaluation, **self._asking) if evaluation is not None else None
        self._concept_exam = DenoisingExam(self.process, harmful, **self._asking)

    def _make_outcome(self, harmful: LatentDataset, held: LatentDataset | None) -> ConceptOutcome:
        """Whether it worked, on images that training does not see where there are such."""
        args, judged, objective = self.args, harmful if held is None else held, self.terms.objective
        low, high = args.level_range
        size = min(args.per_device_harmful_batch_size, len(judged))
        stream = NoisyStream(judged, self.process, size, seed=args.seed, name="outcome", low=low, high=high)
        count = -(-min(MOST_ROWS, 4 * len(judged)) // size)
        weights = {} if objective is None else objective.weights
        return ConceptOutcome(
            self.denoiser, lambda: [self._batch(stream, micro) for micro in range(count)],
            DenoisingExam(self.process, judged, **self._asking), len(judged),
            held_out=held is not None, terms=named_terms(args),
            settings=None if objective is None else objective.settings,
            sites={site: (weights[site].site_share, self.layouts[site]) for site in weights},
            on_weights=self.terms.weight_terms.values if self.terms.weight_terms else None,
        )

    @property
    def teacher(self) -> nn.Module | None:
        """The copy of θ₀ that is imitated; None without distillation."""
        return None if self._teacher is None else self._teacher.model

    def _split(self, plugin: Any) -> bool:
        """Share weights out over ranks (FSDP2), if that was asked for."""
        if plugin is None:
            return False
        if self._validate is not None and self.args.validation_steps:
            raise ConfigError(
                "expected no validate under FSDP2, got one: it is called on one process, and a model that is split "
                "answers to all of them at once. Set validation_steps=0 and draw after training, from whole_model(), "
                "or use DDP."
            )
        for model in (self.teacher, self.bare):
            if model is not None:
                shard(model, plugin, self.accelerator.device)
        self.terms.to(self.accelerator.device)
        return True

    def _make_optimizer(self) -> None:
        args = self.args
        self.optimizer = optimizer_of(args, self.bare, self.changing.parameters, split=self.is_split)
        self.schedule = schedule_of(
            args.lr_scheduler_type, self.optimizer, warmup_steps=args.warmup_steps, steps=args.max_steps
        )
        if hasattr(self.optimizer, "train"):  # schedule-free ones have two points, and train at one of them
            self.optimizer.train()
        self.average = WeightAverage(self.bare, args.ema_decay) if args.ema_decay else None

    def _batch(self, stream: NoisyStream, micro: int) -> NoisyBatch:
        return stream.batch(micro, self.accelerator.device, dtype_of_rows(self.bare))

    # ---- training -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | Path | None = None) -> list[dict[str, float]]:
        """Run all steps, or those left after a checkpoint; leave the guarded (and averaged) weights in the model."""
        if self.accelerator.log_with:
            told = {name: value for name, value in asdict(self.args).items() if value is not None}
            self.accelerator.init_trackers("immunization", config=told)
        with fits_memory("a step", f"{_SMALLER}, or {_LARGER}"):
            if self.args.save_steps or resume_from_checkpoint:
                self._identity = self._identify()
            self._run_loop(resume_from_checkpoint)
        for tracker in self.accelerator.trackers:  # end_training would also take the process group away
            tracker.finish()
        return self.log_history

    def _run_loop(self, resume_from_checkpoint: str | Path | None) -> None:
        self._set_ceilings()
        with self.accelerator.autocast():
            self._outcome_meter.start(self.bare)  # the model is θ₀ until a checkpoint is loaded
        if resume_from_checkpoint:
            self._load(Path(resume_from_checkpoint))
        else:
            self._measure_base()
        hidden = self.args.disable_progress or not self.accelerator.is_local_main_process
        with tqdm(total=self.args.max_steps, initial=self.step, desc="immunize", unit="step", disable=hidden) as bar:
            while self.step < self.args.max_steps:
                with self.watch.over_steps():
                    self._take_step()
                bar.update()
                self._after_step(bar)
        self._finish()

    def _take_step(self) -> None:
        self.compute_gradients()
        if self._before_update is not None:
            self._before_update(self)
        if self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(self.changing.parameters, self.args.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.bare)
        self.step += 1

    def compute_gradients(self) -> None:
        """Leave the gradient of the whole objective of this step in the parameters, equal on every rank."""
        self.watch.step = self.step + 1
        self.optimizer.zero_grad(set_to_none=True)
        first = self.step * self._accumulation
        micros = range(first, first + self._accumulation)
        with self.accelerator.autocast():
            runs = [partial(self._measured, micro) for micro in micros]
            self.terms.begin(runs, spectra=(self.step + 1) % self.args.logging_steps == 0)
        for micro in micros:
            with nullcontext() if micro == micros[-1] else self._no_sync():
                self.accelerator.backward(self._micro_loss(micro))
        with self.accelerator.autocast():
            self.terms.add_weight_gradients(self.bare, self.step)
        self.meter.end_step()

    def _no_sync(self) -> Any:
        return reduced_later(self.bare) if self.is_split else self.accelerator.no_sync(self.model)

    def _micro_loss(self, micro: int) -> Tensor:
        """Retain loss and distillation of one micro-batch, plus a zero whose gradient is the feature terms'."""
        retain = self._batch(self.streams.retain, micro)
        answer, features = self._forward(self.model, "retain", micro, retain)
        loss = self._retain_loss(answer, retain)
        self.meter.add({"retain_loss": loss}, local=True)
        total = (self.args.primary_loss_weight * loss + self._distill(answer, retain)) / self._accumulation
        if self.terms.objective is None:
            return total
        # DDP averages over ranks; the terms are one number of the whole global batch.
        measured, theirs = self._with_harmful(self.model, micro, retain, features)
        total = total + self.terms.injected(measured, world()[1])
        return total + reach([theirs]) if self.is_split else total

    @property
    def _accumulation(self) -> int:
        return self.args.gradient_accumulation_steps

    def _answer(self, model: nn.Module, batch: NoisyBatch) -> Tensor:
        return self.denoiser.call(model, batch.noisy, batch.timesteps, batch.conditions)

    def _draws(self, name: str, micro: int) -> Any:
        return same_draws(self.accelerator.device, self.args.seed, name, micro)

    def _forward(
        self, model: nn.Module, name: str, micro: int, batch: NoisyBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The answer, and the features at every site."""
        with self._draws(name, micro), capture_inputs(self.bare, self.layouts) as caught:
            answer = self._answer(model, batch)
        return answer, dict(caught.items())

    def _with_harmful(
        self, model: nn.Module, micro: int, retain: NoisyBatch, features: dict[str, Tensor]
    ) -> tuple[Measured, Tensor]:
        """What the terms see, and the answer to the harmful rows."""
        harmful = self._batch(self.streams.harmful, micro)
        answer, theirs = self._forward(model, "harmful", micro, harmful)
        labels: dict[Side, Tensor] = {"primary": retain.labels, "harmful": harmful.labels}
        return Measured(MicroBatch({"primary": features, "harmful": theirs}, labels)), answer

    def _measured(self, micro: int) -> Measured:
        """The forwards of one micro-batch, for their features alone."""
        retain = self._batch(self.streams.retain, micro)
        _, features = self._forward(self.bare, "retain", micro, retain)
        return self._with_harmful(self.bare, micro, retain, features)[0]

    def _retain_loss(self, answer: Tensor, batch: NoisyBatch) -> Tensor:
        losses = denoising_losses(answer, batch.target)
        if self.args.min_snr_gamma is not None:
            losses = losses * self.process.min_snr_weight(batch.levels, self.args.min_snr_gamma).to(losses)
        return losses.mean()

    def _distill(self, answer: Tensor, batch: NoisyBatch) -> Tensor | float:
        if self._teacher is None:
            return 0.0
        with self._teacher.answering() as model:
            wanted = self._answer(model, batch)
        distance = denoising_losses(answer, wanted).mean()
        self.meter.add({"distillation": distance}, local=True)
        return self.args.distillation * distance

    # ---- measuring before, between and after ----------------------------------------------------------------------

    def _set_ceilings(self) -> None:
        if self.terms.weight_terms is not None:
            loss = self._concept_exam.ask(self.denoiser, self.bare).loss
            for objective in self.terms.weight_terms.objectives.values():
                objective.ceiling = self.args.attacker_ceiling * loss

    def _measure_base(self) -> None:
        if self._exam is not None:
            self.guard.base = self._points()
        found: dict[str, list[Tensor]] = {}
        for step in range(_REFERENCE_BATCHES):
            gradients = WrongTargetGradients(self.denoiser, self.bare, self.layouts)
            micros = range(step * self._accumulation, (step + 1) * self._accumulation)
            batches = [self._batch(self.streams.retain, micro) for micro in micros]
            for micro, batch, wrong in zip(micros, batches, wrong_targets(batches), strict=True):
                with self._draws("reference", micro):
                    gradients.add(batch, wrong)
            at_sites, at_weights = gradients.norms()
            for name, norm in {**at_sites, "": at_weights}.items():
                found.setdefault(name, []).append(norm)
        for name, weights in self.terms.weights.items():
            if weights.needs_reference:
                weights.reference = torch.stack(found[name]).mean()

    def _judged_weights(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that would be returned now: the moving average where there is one."""
        return self.average.swapped(self.bare) if self.average is not None else weights_to_judge(self.optimizer)

    def _points(self) -> float:
        assert self._exam is not None
        return -100 * math.log(self._exam.ask(self.denoiser, self.bare).loss)

    def _after_step(self, bar: Any) -> None:
        args = self.args
        if self.watch.is_due or self.step == args.max_steps:
            self.watch.settle()
        if self.step % args.logging_steps == 0 or self.step == args.max_steps:
            self._log(bar)
        if self._exam is not None and (self.step % args.eval_steps == 0 or self.step == args.max_steps):
            self._guard_step()
        if self._validate and args.validation_steps and self.step % args.validation_steps == 0:
            with self._judged_weights():
                if self.accelerator.is_main_process:
                    self._validate(self.bare.eval(), self.step)
                    self.bare.train()
        if args.save_steps and self.step % args.save_steps == 0:
            self._save()

    def _log(self, bar: Any) -> None:
        means = {name: value for name, value in self.meter.drain().items() if math.isfinite(value)}
        self.log_history.append({"step": self.step, **means})
        bar.set_postfix_str(f"retain loss {means.get('retain_loss', math.nan):.4f}", refresh=False)
        if self.accelerator.log_with:
            self.accelerator.log(means, step=self.step)

    def _guard_step(self) -> None:
        with self._judged_weights():
            found = self._guarded.check(self.step, self._points(), last=self.step)
        self._guarded.set_back(self.bare, self.optimizer, self.average, self.args.max_steps - self.step)
        if self.accelerator.log_with:
            self.accelerator.log(found, step=self.step)

    def _refuse_ruined(self) -> None:
        self.watch.settle()
        refuse_non_finite(
            self.bare, "the trained model", error=TrainingDivergedError,
            remedy=DIVERGED,
        )

    def _finish(self) -> None:
        self._refuse_ruined()
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()
        if self.average is not None:
            self.average.copy_to(self.bare)
        if self._guarded.on:
            self.guard_record = self._guarded.finish(lambda what: self._points())
        with self.accelerator.autocast():
            self.outcome = self._outcome_meter.record(self.bare, self.guard_record)
        if self.outcome is not None:
            self.accelerator.print(self.outcome.told)
        merged = self.args.trainable_modules == "lora" and self.args.merge_lora
        if merged:
            self.merge_rounding = merge_factors(self.bare)
            if self.merge_rounding > NOTABLE:
                self.accelerator.print(told_rounding(self.merge_rounding, next(self.bare.parameters()).dtype))
        for name, parameter in settle(self.bare).named_parameters():  # factors that were not merged stay as they are
            parameter.requires_grad_(self._asked.get(name.replace(".base_layer.", "."), parameter.requires_grad))
        # Takes away Accelerate's casting forward: the model in memory answers as the one that is saved.
        self.bare = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        unshare_draws(self.bare)
        self.bare.eval()
        if self.guard_record is not None and merged:  # merging rounds
            self.guard_record = self.guard.record(self._points())

    def whole_model(self) -> nn.Module | None:
        """The model as it is now, with whole weights: to save it, or to draw with it.

        Under FSDP2 a copy on the CPU of the first process and None elsewhere, else the model itself. Every process
        calls this.
        """
        if not self.is_split:
            return self.bare
        kind = original_class(self.bare)
        return whole_copy(self.bare, lambda: kind.from_config(self.bare.config))

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def _identify(self) -> dict[str, Any]:
        """What a checkpoint may be continued with: options, model as it was given, rows.

        Batch sizes are those of all processes together: another number of them may share the same batch.
        """
        digest = hashlib.sha256()
        for name, value in sorted(self.bare.state_dict().items()):
            digest.update(name.encode() + digest_tensor(whole(value.detach())))
        told = {name: None if held is None else held.fingerprint(source="", role="").sha256
                for name, held in self._rows.items()}
        options = scientific_options(self.args)
        for name in ("per_device_train_batch_size", "per_device_harmful_batch_size"):
            options[name.replace("per_device", "global")] = options.pop(name) * world()[1]
        return {**options, "model": digest.hexdigest(), **told}

    def _save(self) -> None:
        self._refuse_ruined()
        folder, first = Path(self.args.output_dir) / f"checkpoint-{self.step}", self.accelerator.is_main_process
        if first:
            unmark(folder)
        self._state.save(folder, write=first)
        save_loop(
            folder, self.step, self.changing, self.optimizer, self.schedule, self.log_history, self._identity,
            write=first,
        )
        if first:
            prune_checkpoints(Path(self.args.output_dir), self.args.save_total_limit, self.step)
        self.accelerator.wait_for_everyone()

    def _load(self, folder: Path) -> None:
        check_options(folder, self._identity)
        self._state.load(folder)
        self.step, self.log_history = load_loop(folder, self.changing, self.optimizer, self.schedule)
