"""What a run needs before its first step: checked data, trained weights, streams of noised rows, and terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_immunize.diffusion import Denoiser, LatentDataset, NoiseProcess, denoising_losses, dtype_of_rows
from hf_immunize.errors import ConfigError, DataError, ModelError
from hf_immunize.features import RowLayout
from hf_immunize.models import refuse_non_finite
from hf_immunize.training.core.attack_terms import IMMA_TERM, SIMULATED_TERM, build_attack
from hf_immunize.training.core.balancing import check_numbers, numbers_of
from hf_immunize.training.core.distributed import world
from hf_immunize.training.core.draws import same_draws
from hf_immunize.training.core.erasure import ESD
from hf_immunize.training.core.launching import refuse_deepspeed_of, sharding_ourselves
from hf_immunize.training.core.meter import Meter
from hf_immunize.training.core.objective import GlobalObjective
from hf_immunize.training.core.registry import (
    OBJECTIVES,
    OF_DENOISERS,
    AnyTerm,
    on_features,
    on_weights,
    refuse_one_class,
    terms_of,
)
from hf_immunize.training.core.step import Step
from hf_immunize.training.core.terms import TermSettings
from hf_immunize.training.core.unrolled import UnrolledAttack
from hf_immunize.training.core.weight_terms import AttackedTask, WeightTerms
from hf_immunize.training.diffusion.asking import denoise_of
from hf_immunize.training.diffusion.conditions import AttackerConditions, kinds_of
from hf_immunize.training.diffusion.config import DiffusionImmunizationConfig
from hf_immunize.training.diffusion.factors import put_factors
from hf_immunize.training.diffusion.sites import attention_projections, choose_layouts, choose_sites
from hf_immunize.training.diffusion.stream import NoisyBatch, NoisyStream, RenamedStream


def accelerator_of(args: DiffusionImmunizationConfig) -> Accelerator:
    """The accelerator that ``args`` ask for. Raises ConfigError for a tracker or a precision that cannot be had."""
    refuse_deepspeed_of()
    if args.report_to != "none":
        installed = [str(getattr(kind, "value", kind)) for kind in get_available_trackers()]
        registered = set(LOGGER_TYPE_TO_CLASS) - set(LoggerType.list())
        if args.report_to not in (*installed, *registered, *(["all"] if installed else [])):
            raise ConfigError(
                f"expected report_to 'none' or an installed tracker among {sorted({*installed, *registered})}, got "
                f"{args.report_to!r}: install its package, which is one of {sorted(LoggerType.list())}."
            )
    try:
        with sharding_ourselves():
            return Accelerator(
                mixed_precision=args.mixed_precision,
                cpu=args.use_cpu,
                log_with=None if args.report_to == "none" else args.report_to,
                project_dir=args.output_dir,
            )
    except ValueError as error:
        raise ConfigError(
            f"expected the precision and device of this process's first Accelerator, got "
            f"mixed_precision={args.mixed_precision!r}, use_cpu={args.use_cpu}: {error} Use one setting per process."
        ) from error


def check_data(
    denoiser: Denoiser,
    model: nn.Module,
    args: DiffusionImmunizationConfig,
    train: LatentDataset | None,
    harmful: LatentDataset | None,
    evaluation: LatentDataset | None,
    held: LatentDataset | None = None,
) -> None:
    """Raise DataError, ModelError or ConfigError for data or a model that this run cannot use.

    Args:
        held: harmful rows that are not trained on.
    """
    _refuse_narrow(denoiser, model, args)
    refuse_non_finite(model, "the model before immunization")
    if train is None or harmful is None:
        missing = "train_dataset" if train is None else "harmful_dataset"
        raise DataError(f"expected a train_dataset and a harmful_dataset, got no {missing}.")
    named = {"train_dataset": train, "harmful_dataset": harmful, "eval_dataset": evaluation}
    for name, dataset in {**named, "harmful_eval_dataset": held}.items():
        if dataset is not None:
            _check_rows(denoiser, model, name, dataset)
            _check_shape(train, name, dataset)
    if len(harmful) < 2:
        raise DataError(
            f"expected at least two images of the concept in harmful_dataset, got {len(harmful)}: one image has no "
            "spectrum, and an attack on it is memorisation."
        )
    refuse_one_class(named_terms(args), harmful.labels.tolist())
    if args.max_primary_drop is not None and evaluation is None:
        raise ConfigError("expected an eval_dataset for max_primary_drop, got none: pass held-out retain rows.")
    attacks = any(not term.erases for term in on_weights(named_terms(args)))
    if not attacks and args.attacker_conditions != "name":
        raise ConfigError(
            f"expected an objective with a simulated attacker (simulated_attack, imma, resalign_moreau) for "
            f"attacker_conditions={args.attacker_conditions!r}, got objective={args.objective!r}: leave "
            "attacker_conditions at name."
        )
    if on_weights(named_terms(args)) and args.attacker_renamed > 0:
        told = [{name: tuple(value.shape[1:]) for name, value in held.conditions.items()} for held in (train, harmful)]
        if told[0] != told[1]:
            raise DataError(
                f"expected retain and harmful rows with conditions of one shape for attacker_renamed, got {told[0]} "
                f"and {told[1]}: encode both with one pipeline."
            )

def _check_rows(denoiser: Denoiser, model: nn.Module, name: str, dataset: LatentDataset) -> None:
    """Ask the model about the first row; the dataset is named where that fails."""
    try:
        denoiser.probe(model, dataset.latents, dataset.conditions)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def _check_shape(train: LatentDataset, name: str, dataset: LatentDataset) -> None:
    """Raise DataError for rows of the concept of another shape than the retain rows': terms compare both."""
    if "harmful" in name and train.latents.shape[1:] != dataset.latents.shape[1:]:
        raise DataError(
            f"expected harmful latents of the retain latents' shape {tuple(train.latents.shape[1:])}, got "
            f"{tuple(dataset.latents.shape[1:])} in {name}: encode both at one resolution with one VAE."
        )


def _refuse_narrow(denoiser: Denoiser, model: nn.Module, args: DiffusionImmunizationConfig) -> None:
    """Raise ModelError for weights below float32 that defender or attacker trains, and for a frozen base below bf16."""
    wide = (torch.float32, torch.float64)
    every = dict(model.named_parameters())
    trained = {"all": every, "lora": {}}.get(args.trainable_modules)
    if trained is None:
        ends = tuple(f"{name}." for name in attention_projections(denoiser, model))
        trained = {name: parameter for name, parameter in every.items() if name.startswith(ends)}
    if narrow := sorted({str(p.dtype) for p in trained.values() if p.dtype not in wide}):
        raise ModelError(
            f"expected weights in float32, got {', '.join(narrow)}: most updates are smaller than their rounding. Load "
            "the pipeline with torch_dtype=torch.float32 and set mixed_precision=bf16, or train LoRA factors beside "
            "them with trainable_modules=lora."
        )
    narrow = sorted({str(p.dtype) for p in every.values() if p.dtype not in wide})
    if narrow and on_weights(named_terms(args)) and args.attacker_rank == 0:
        raise ModelError(
            f"expected weights in float32 for an attacker that trains all of them, got {', '.join(narrow)}: set "
            "attacker_rank above 0, so that it trains LoRA factors, or load with torch_dtype=torch.float32."
        )
    if other := [name for name in narrow if name != str(torch.bfloat16)]:
        raise ModelError(
            f"expected frozen weights in float32 or bfloat16, got {', '.join(other)}: float16 overflows without a "
            "gradient scaler, and what is quantized cannot take the update. Load with torch_dtype=torch.bfloat16."
        )


def choose_trainable(denoiser: Denoiser, model: nn.Module, trainable: str, rank: int = 8) -> None:
    """Leave gradients on for ``all`` weights, ``attention`` projections only, or ``lora`` factors put on them."""
    if trainable == "lora":
        put_factors(denoiser, model, rank)
        return
    model.requires_grad_(trainable == "all")
    if trainable == "attention":
        for name in attention_projections(denoiser, model):
            model.get_submodule(name).requires_grad_(True)


@dataclass(frozen=True)
class Streams:
    """Noised rows of this rank: retain rows, rows for the feature terms, rows for simulated attacks."""

    retain: NoisyStream
    harmful: NoisyStream
    attack: RenamedStream

    @classmethod
    def of(
        cls, args: DiffusionImmunizationConfig, process: NoiseProcess, train: LatentDataset, harmful: LatentDataset
    ) -> Streams:
        """The streams of a run."""
        rank, size = world()
        share: dict[str, Any] = {"seed": args.seed, "rank": rank, "world_size": size}
        low, high = args.level_range
        parts = args.gradient_accumulation_steps
        rows = args.per_device_harmful_batch_size * size
        concept: dict[str, Any] = {"low": low, "high": high, **share}
        return cls(
            NoisyStream(
                train, process, args.per_device_train_batch_size * size, name="retain", logit_normal=args.logit_normal,
                parts=parts, **share,
            ),
            NoisyStream(harmful, process, rows, name="harmful", parts=parts, **concept),
            RenamedStream(  # an attacker's step has as many rows as the optimizer step that it is simulated in
                NoisyStream(harmful, process, parts * rows, name="attack", **concept),
                NoisyStream(train, process, parts * rows, name="names", **share),
                args.attacker_renamed,
                rank,
                size,
            ),
        )


def told_conditions(
    args: DiffusionImmunizationConfig, model: nn.Module, train: LatentDataset, harmful: LatentDataset,
    null: Mapping[str, torch.Tensor] | None,
) -> tuple[AttackerConditions | None, AttackerConditions | None]:
    """What attackers condition on, and how rows are told no name; None where nothing asks for it."""
    kinds = kinds_of(args.attacker_conditions)
    told = partial(AttackerConditions, model=model, concept=harmful, retained=train, seed=args.seed, null=null)
    return (
        None if kinds == ("name",) else told(kinds),
        told(("none",)) if ESD in named_terms(args) else None,
    )


def asks_for_none(args: DiffusionImmunizationConfig) -> bool:
    """Whether something in a run is told no name, for which a denoiser of text needs the empty prompt."""
    return "none" in kinds_of(args.attacker_conditions) or ESD in named_terms(args)


def named_terms(args: DiffusionImmunizationConfig) -> tuple[AnyTerm, ...]:
    """Every term that ``args.objective`` names. A denoiser has no classifier: imma is on its weights."""
    known = OBJECTIVES | OF_DENOISERS | {"imma": (IMMA_TERM,)}
    if args.attacker_second_order:
        exact = partial(build_attack, False, kind=UnrolledAttack)
        known |= {"simulated_attack": (replace(SIMULATED_TERM, build=exact),)}
    return terms_of(args.objective, known)


def build_step(
    args: DiffusionImmunizationConfig, denoiser: Denoiser, model: nn.Module, streams: Streams, meter: Meter,
    conditions: AttackerConditions | None = None, unnamed: AttackerConditions | None = None,
) -> tuple[Step, dict[str, RowLayout]]:
    """The terms that ``args.objective`` names at work, and how an input at each site becomes one row per image."""
    terms = named_terms(args)
    check_numbers(args, terms)
    objective, layouts, at_work = None, {}, None
    if found := on_features(terms):
        sample = streams.harmful.batch(0, next(model.parameters()).device, dtype_of_rows(model))
        sites = choose_sites(denoiser, model, args.sites, sample)
        layouts = choose_layouts(denoiser, model, sites, args.site_layouts, sample)
        objective = GlobalObjective(
            found,
            TermSettings(horizons=args.horizons, group_rows=args.harmful_group_rows),
            dict.fromkeys(sites, 1 / len(sites)),
            strength=args.strength,
            bank_rows=0,
            meter=meter,
            **numbers_of(args, found),
        )
    if held := on_weights(terms):
        most = None if args.attacker_second_order else args.per_device_harmful_batch_size
        rows = attacked_rows(args, model, streams.attack)
        task = replace(
            denoising_task(denoiser, model, rows, args.seed, most, conditions),
            denoise=denoise_of(denoiser, erasure_rows(model, streams.attack), unnamed, args.seed),
        )
        at_work = WeightTerms(
            {term: term.build(task, args) for term in held}, strength=args.strength, **numbers_of(args, held)
        )
    return Step(objective, at_work, meter, optional_sites=True), layouts


def attacked_rows(
    args: DiffusionImmunizationConfig, model: nn.Module, stream: RenamedStream
) -> Callable[[int, int], NoisyBatch]:
    """Rows of each step of the attacker at each step of ours: K of its steps take K + 1 batches."""
    place, width = next(model.parameters()), 2 if args.attacker_goes_on else args.attacker_steps + 1
    dtype = dtype_of_rows(model)
    return lambda step, attack_step: stream.batch(step * width + attack_step, place.device, dtype)


def erasure_rows(model: nn.Module, attack: RenamedStream) -> dict[str, Callable[[int], NoisyBatch]]:
    """Rows of the concept under its own name, and as many of what is retained, of each step."""
    place, dtype = next(model.parameters()), dtype_of_rows(model)
    return {
        "named": lambda step: attack.concept.batch(step, place.device, dtype),
        "related": lambda step: attack.names.batch(step, place.device, dtype),
    }


def denoising_task(
    denoiser: Denoiser, model: nn.Module, rows: Callable[[int, int], NoisyBatch], seed: int, most: int | None = None,
    conditions: AttackerConditions | None = None,
) -> AttackedTask:
    """The denoising loss on harmful rows, of any copy of the model.

    Args:
        most: rows at a time; the activations of more are computed again for the backward pass, so that an attacker's
            step takes no more memory than a micro-batch of ours. None: all at once.
        conditions: what each attack is conditioned on; None for what the rows hold.
    """

    def losses(attacked: nn.Module, batch: NoisyBatch) -> torch.Tensor:
        answer = denoiser.call(attacked, batch.noisy, batch.timesteps, batch.conditions)
        return denoising_losses(answer, batch.target)

    def loss(attacked: nn.Module, step: int, attack_step: int) -> torch.Tensor:
        batch = rows(step, attack_step)
        if conditions is not None:
            batch = conditions.tell(attacked, step, batch)
        parts = batch.split(most or len(batch.noisy))
        with same_draws(batch.noisy.device, seed, "attack", step, attack_step):
            if len(parts) == 1:
                return losses(attacked, batch).mean()
            found = [checkpoint(losses, attacked, part, use_reentrant=False) for part in parts]
        return torch.cat(found).mean()

    tokens = {} if conditions is None else conditions.tokens
    return AttackedTask(model, attention_projections(denoiser, model), loss, seed, tokens=tokens)
