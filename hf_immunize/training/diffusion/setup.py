"""What a run needs before its first step: checked data, trained weights, streams of noised rows, and terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType
from torch import nn

from hf_immunize.diffusion import Denoiser, LatentDataset, NoiseProcess
from hf_immunize.errors import ConfigError, DataError, ModelError
from hf_immunize.features import RowLayout
from hf_immunize.models import refuse_non_finite
from hf_immunize.training.core.balancing import TermWeights, parse_numbers
from hf_immunize.training.core.distributed import world
from hf_immunize.training.core.meter import Meter
from hf_immunize.training.core.objective import GlobalObjective
from hf_immunize.training.core.sharding import sharding_ourselves
from hf_immunize.training.core.terms import Term, TermSettings, refuse_one_class, terms_of
from hf_immunize.training.diffusion.config import DiffusionImmunizationConfig
from hf_immunize.training.diffusion.factors import put_factors
from hf_immunize.training.diffusion.simulated import SIMULATED_TERM, SimulatedAttack
from hf_immunize.training.diffusion.sites import attention_projections, choose_layouts, choose_sites
from hf_immunize.training.diffusion.stream import NoisyStream, RenamedStream
from hf_immunize.training.diffusion.unrolled import UnrolledAttack


def accelerator_of(args: DiffusionImmunizationConfig) -> Accelerator:
    """The accelerator that ``args`` ask for. Raises ConfigError for a tracker or a precision that cannot be had."""
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
) -> None:
    """Raise DataError, ModelError or ConfigError for data or a model that this run cannot use."""
    narrow = sorted({str(p.dtype) for p in model.parameters() if p.dtype not in (torch.float32, torch.float64)})
    if narrow:
        raise ModelError(
            f"expected weights in float32, got {', '.join(narrow)}: most updates are smaller than their rounding. Load "
            "the pipeline with torch_dtype=torch.float32 and set mixed_precision=bf16."
        )
    refuse_non_finite(model, "the model before immunization")
    if train is None or harmful is None:
        missing = "train_dataset" if train is None else "harmful_dataset"
        raise DataError(f"expected a train_dataset and a harmful_dataset, got no {missing}.")
    for dataset in (train, harmful, *([evaluation] if evaluation is not None else [])):
        denoiser.probe(model, dataset.latents, dataset.conditions)
    if len(harmful) < 2:
        raise DataError(
            f"expected at least two images of the concept in harmful_dataset, got {len(harmful)}: one image has no "
            "spectrum, and an attack on it is memorisation."
        )
    if args.feature_objective:
        refuse_one_class(terms_of(args.feature_objective), harmful.labels.tolist())
    if args.max_loss_factor is not None and evaluation is None:
        raise ConfigError("expected an eval_dataset for max_loss_factor, got none: pass held-out retain rows.")
    if args.simulates and args.attacker_renamed > 0:
        told = [{name: tuple(value.shape[1:]) for name, value in held.conditions.items()} for held in (train, harmful)]
        if told[0] != told[1]:
            raise DataError(
                f"expected retain and harmful rows with conditions of one shape for attacker_renamed, got {told[0]} "
                f"and {told[1]}: encode both with one pipeline."
            )
    if train.latents.shape[1:] != harmful.latents.shape[1:]:
        raise DataError(
            f"expected harmful latents of the retain latents' shape {tuple(train.latents.shape[1:])}, got "
            f"{tuple(harmful.latents.shape[1:])}: encode both at one resolution with one VAE."
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
        share = {"seed": args.seed, "rank": rank, "world_size": size}
        low, high = args.level_range
        rows = args.per_device_harmful_batch_size * size
        concept = {"low": low, "high": high, **share}
        return cls(
            NoisyStream(
                train, process, args.per_device_train_batch_size * size, name="retain", logit_normal=args.logit_normal,
                **share,
            ),
            NoisyStream(harmful, process, rows, name="harmful", **concept),
            RenamedStream(
                NoisyStream(harmful, process, rows, name="attack", **concept),
                NoisyStream(train, process, rows, name="names", **share),
                args.attacker_renamed,
                rank,
                size,
            ),
        )


def named_terms(args: DiffusionImmunizationConfig) -> tuple[Term, ...]:
    """Every term that ``args.objective`` names."""
    of_features = terms_of(args.feature_objective) if args.feature_objective else ()
    return (*of_features, *((SIMULATED_TERM,) if args.simulates else ()))


@dataclass
class Terms:
    """Feature terms, the simulated attack and its weight; each None where the objective has none."""

    objective: GlobalObjective | None
    attack: SimulatedAttack | None
    attack_weights: TermWeights | None
    layouts: dict[str, RowLayout]
    """Where features are measured, and how an input there becomes one row per image."""

    @classmethod
    def of(
        cls, args: DiffusionImmunizationConfig, denoiser: Denoiser, model: nn.Module, streams: Streams, meter: Meter
    ) -> Terms:
        """The terms that ``args.objective`` names."""
        terms = terms_of(args.feature_objective) if args.feature_objective else ()
        names = [term.name for term in named_terms(args)]
        if "=" in args.weight:
            parse_numbers(args.weight, names, "weight")
        parse_numbers(args.term_shares, names, "term_shares")
        place = next(model.parameters())
        objective, attack, weights, layouts = None, None, None, {}
        if terms:
            sample = streams.harmful.batch(0, place.device, place.dtype)
            sites = choose_sites(denoiser, model, args.sites, sample)
            layouts = choose_layouts(denoiser, model, sites, args.site_layouts, sample)
            objective = GlobalObjective(
                terms,
                TermSettings(horizons=(args.horizon,), group_rows=args.harmful_group_rows),
                dict.fromkeys(sites, 1 / len(sites)),
                strength=args.strength,
                bank_rows=0,
                meter=meter,
                **_numbers_of(args, terms),
            )
        if args.simulates:
            kind = UnrolledAttack if args.attacker_second_order else SimulatedAttack
            attack = kind.of(args, denoiser, model, streams.attack)
            weights = TermWeights((SIMULATED_TERM,), strength=args.strength, **_numbers_of(args, (SIMULATED_TERM,)))
        return cls(objective, attack, weights, layouts)

    @property
    def sites(self) -> list[str]:
        """Where features are measured; empty without feature terms."""
        return self.objective.sites if self.objective is not None else []

    @property
    def weights(self) -> dict[str, TermWeights]:
        """Every balance, by site; that of the simulated attack under the empty name."""
        found = dict(self.objective.weights) if self.objective is not None else {}
        return found | ({"": self.attack_weights} if self.attack_weights is not None else {})

    @property
    def factor(self) -> float:
        """What the utility guard multiplies the strength with, everywhere."""
        return next(iter(self.weights.values())).factor

    @factor.setter
    def factor(self, value: float) -> None:
        for weights in self.weights.values():
            weights.factor = value

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a resumed run needs, as tensors."""
        kept = {} if self.objective is None else _under("objective", self.objective.state())
        if self.attack is not None and self.attack_weights is not None:
            kept |= _under("attack", self.attack.state()) | _under("weights", self.attack_weights.state())
        return kept

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take back what ``state`` returned."""
        if self.objective is not None:
            self.objective.load_state(_of("objective", state))
        if self.attack is not None and self.attack_weights is not None:
            self.attack.load_state(_of("attack", state))
            self.attack_weights.load_state(_of("weights", state))


def _under(place: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{place}:{name}": value for name, value in state.items()}


def _of(place: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    start = f"{place}:"
    return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}


def _numbers_of(args: DiffusionImmunizationConfig, terms: tuple[Term, ...]) -> dict[str, Any]:
    """``weight`` and ``shares`` as far as they name these terms."""
    names = {term.name for term in terms}

    def own(text: str | None) -> str | None:
        if not text or "=" not in text:
            return text
        return ",".join(part for part in text.split(",") if part.partition("=")[0].strip() in names) or None

    return {"weight": own(args.weight) or "1", "shares": own(args.term_shares)}
