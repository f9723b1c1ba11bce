"""Options of a diffusion immunization run."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_immunize.errors import ConfigError

SIMULATED_ATTACK, IMMA = "simulated_attack", "imma"
_OPERATIONAL = re.compile(
    r"^(output_dir|eval_batch_size|logging_.*|save_.*|validation_steps|report_to|disable_progress|use_cpu)$"
)


@dataclass
class DiffusionImmunizationConfig:
    """Options of ``DiffusionImmunizationTrainer``; every option is explained in its own help text."""

    output_dir: str = field(metadata={"help": "Folder for checkpoints and the finished pipeline."})
    objective: str = field(
        default="condition_number",
        metadata={
            "help": "What makes learning the concept slow: condition_number, ill_only, opt_kappa, group_kappa or "
            "closed_form_adversary on the features at `sites`; simulated_attack on the weights (the bounded loss an "
            "attacker has after attacker_steps steps) or imma (the same with a LoRA attacker that goes on from step to "
            "step, one inner step each; trainable=attention). Several are joined with '+'."
        },
    )
    weight: str = field(
        default="auto",
        metadata={
            "help": "Weight of each term. 'auto' balances gradient norms: every term pushes with strength x the "
            "gradient norm of a fully wrong retain batch. A number, or term=number pairs joined with commas, fixes "
            "the weights; strength is then a plain factor."
        },
    )
    strength: float = field(
        default=0.1, metadata={"help": "The one knob: factor on all immunization terms. 0 turns them off."}
    )
    term_shares: str | None = field(
        default=None, metadata={"help": "Relative strength of single terms, e.g. 'primary_r_well=0.1'; 1 if not named."}
    )
    sites: str = field(
        default="attention,middle",
        metadata={
            "help": "Layers whose inputs are measured: 'attention' (q, k, v and out projections of every attention "
            "layer), 'middle' (features in the middle of the denoiser), or ends of module names, joined with commas. "
            "Inputs are averaged over tokens. Inputs the denoiser cannot change (text embeddings) are left out, and "
            "layers that read the same tensor count once."
        },
    )
    site_layouts: str | None = field(
        default=None,
        metadata={
            "help": "Axes of single sites' inputs where they should not be found, e.g. 'attn1.to_q=(n k) t d': n "
            "images, d features, all else is averaged; (n k): k windows per image; 'n 0 d': the first token alone."
        },
    )
    site_levels: str = field(
        default="0,1",
        metadata={
            "help": "Range of noise levels, as shares of the schedule from clean to noisy, at which harmful features "
            "and simulated attacks are taken; each row draws its own level, uniformly."
        },
    )
    harmful_group_rows: int = field(default=32, metadata={"help": "group_kappa: rows per group."})
    horizon: float = field(default=100.0, metadata={"help": "closed_form_adversary: steps of the simulated probe."})
    attacker_steps: int = field(default=4, metadata={"help": "simulated_attack: steps K an attacker takes."})
    attacker_learning_rate: float = field(
        default=1e-3, metadata={"help": "simulated_attack, imma: the attacker's learning rate (AdamW)."}
    )
    attacker_rank: int = field(
        default=0,
        metadata={
            "help": "simulated_attack, imma: 0 trains all weights, in a copy of them; else LoRA of this rank on "
            "attention, beside weights that are copied only where `trainable` trains them."
        },
    )
    attacker_second_order: bool = field(
        default=False,
        metadata={
            "help": "simulated_attack: the exact gradient, through the attacker's steps, in place of the first-order "
            "one. The attacker then takes smooth steps, of attacker_learning_rate at most per weight, since AdamW's "
            "have no useful derivative. Attention runs on the math kernel; the term costs four to five times as much."
        },
    )
    attacker_renamed: float = field(
        default=0.0,
        metadata={
            "help": "simulated_attack, imma: share of the attacker's rows that are taught under the conditions (class, "
            "prompt) of random retain rows. At 0 the cheapest defence is to spoil the concept's own name."
        },
    )
    attacker_ceiling: float = field(
        default=3.0,
        metadata={
            "help": "simulated_attack: the attacker's loss is pushed up to this multiple of the base's own loss on the "
            "concept, and no further."
        },
    )
    primary_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the retain denoising loss."})
    distillation: float = field(
        default=0.0,
        metadata={"help": "Weight of the squared distance to the base's answers on retain rows (prior preservation)."},
    )
    max_loss_factor: float | None = field(
        default=None,
        metadata={
            "help": "Largest allowed retain loss on eval_dataset, as a factor of the base's (1.05: 5 percent more), "
            "on noise that never changes. The strength follows it, and the last weights that kept it are returned."
        },
    )
    max_strength_factor: float = field(
        default=8.0, metadata={"help": "How far above `strength` the guard may raise it while there is room."}
    )
    trainable: str = field(
        default="all",
        metadata={
            "help": "Weights that are trained: 'all', 'attention' projections only, or 'lora' factors on these, which "
            "are merged in the end."
        },
    )
    merge_lora: bool = field(
        default=True,
        metadata={
            "help": "trainable=lora: merge the factors into the weights in the end. A base in bfloat16 rounds small "
            "updates away, and how much is said; false leaves PEFT's layers in the model, for save_lora_adapter."
        },
    )
    lora_rank: int = field(default=8, metadata={"help": "trainable=lora: rank of the defender's factors."})
    min_snr_gamma: float | None = field(
        default=None, metadata={"help": "Min-SNR weighting of the retain loss with this gamma (5 is usual)."}
    )
    logit_normal: bool = field(
        default=False, metadata={"help": "Draw retain noise levels logit-normally, as SD3 and Flux are trained."}
    )
    max_steps: int = field(default=500, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Retain rows per device and micro-batch."})
    per_device_harmful_batch_size: int = field(
        default=32, metadata={"help": "Harmful rows per device and micro-batch; spectra are of the global batch."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches per optimizer step."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    optim: str = field(
        default="adamw_torch",
        metadata={
            "help": "The optimizer, by its name in TrainingArguments.optim: adamw_torch, adamw_torch_fused, adafactor, "
            "sgd, adamw_bnb_8bit or paged_adamw_8bit (bitsandbytes), adamw_torch_8bit (torchao), …"
        },
    )
    optim_args: str | None = field(
        default=None, metadata={"help": "Arguments of the optimizer, as in TrainingArguments: 'momentum=0.9'."}
    )
    optim_target_modules: str | None = field(
        default=None, metadata={"help": "GaLore and APOLLO: linear layers with low-rank moments, or 'all-linear'."}
    )
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Name of a diffusers.optimization schedule."})
    warmup_steps: int = field(default=0, metadata={"help": "Steps of linear warm-up."})
    weight_decay: float = field(default=0.0, metadata={"help": "Decoupled weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping; 0 switches it off."})
    ema_decay: float = field(
        default=0.0,
        metadata={"help": "Decay of a moving average of the weights, which is then what is judged and saved. 0: off."},
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade time for activation memory."})
    mixed_precision: str = field(default="no", metadata={"help": "no or bf16."})
    eval_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows at a time when the guard evaluates and images are drawn. Default: "
            "per_device_train_batch_size, which fits where a step does."
        },
    )
    eval_steps: int = field(default=50, metadata={"help": "Steps between evaluations of the guard."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between log entries."})
    save_steps: int = field(default=0, metadata={"help": "Steps between checkpoints; 0 for none."})
    save_total_limit: int = field(default=1, metadata={"help": "Checkpoints to keep."})
    validation_steps: int = field(default=0, metadata={"help": "Steps between validation images; 0 for none."})
    seed: int = field(default=0, metadata={"help": "Seed of rows, noise, levels and dropout."})
    report_to: str = field(default="none", metadata={"help": "Tracker for Accelerate, e.g. tensorboard."})
    disable_progress: bool = field(default=False, metadata={"help": "Hide the progress bar."})
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU even where there is a GPU."})

    def __post_init__(self) -> None:
        if self.eval_batch_size is None:
            self.eval_batch_size = self.per_device_train_batch_size
        for name in (
            "strength", "distillation", "primary_loss_weight", "attacker_learning_rate", "ema_decay", "weight_decay",
            "warmup_steps", "max_grad_norm",
        ):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"expected {name} of at least 0, got {getattr(self, name)}.")
        for name in (
            "max_steps", "gradient_accumulation_steps", "attacker_steps", "per_device_train_batch_size",
            "per_device_harmful_batch_size", "eval_batch_size", "eval_steps", "logging_steps", "harmful_group_rows",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected {name} of at least 1, got {getattr(self, name)}.")
        for name in ("attacker_ceiling", "min_snr_gamma", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"expected {name} above 0, got {value}.")
        for name, least in (("attacker_rank", 0), ("save_steps", 0), ("save_total_limit", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"expected {name} of at least {least}, got {getattr(self, name)}.")
        if self.primary_loss_weight == 0 and self.distillation == 0:
            raise ConfigError("expected something that keeps the model, got primary_loss_weight=distillation=0.")
        if self.max_loss_factor is not None and not 1 <= self.max_loss_factor < float("inf"):
            raise ConfigError(f"expected max_loss_factor of at least 1, and finite, got {self.max_loss_factor}.")
        if not self.max_strength_factor >= 1:
            raise ConfigError(f"expected max_strength_factor of at least 1, got {self.max_strength_factor}.")
        if not all(self._names):
            raise ConfigError(f"expected objectives joined with '+', got {self.objective!r}.")
        if self.mixed_precision not in ("no", "bf16"):
            raise ConfigError(
                f"expected mixed_precision 'no' or 'bf16', got {self.mixed_precision!r}: fp16 scales gradients, and "
                "the terms' gradients are added unscaled."
            )
        if self.trainable not in ("all", "attention", "lora"):
            raise ConfigError(f"expected trainable 'all', 'attention' or 'lora', got {self.trainable!r}.")
        self._check_attack()
        if not 0 <= self.attacker_renamed <= 1:
            raise ConfigError(f"expected attacker_renamed between 0 and 1, got {self.attacker_renamed}.")
        if not self.ema_decay < 1:
            raise ConfigError(f"expected ema_decay below 1, got {self.ema_decay}.")
        self.level_range  # noqa: B018 - raises now rather than at the first step

    def _check_attack(self) -> None:
        names = self._names
        if IMMA in names and (self.trainable != "attention" or self.attacker_rank < 1 or SIMULATED_ATTACK in names):
            raise ConfigError(
                "expected imma as it was published, with trainable=attention, attacker_rank of at least 1 and no "
                f"simulated_attack beside it, got trainable={self.trainable!r}, attacker_rank={self.attacker_rank}, "
                f"objective={self.objective!r}."
            )
        if self.attacker_second_order and SIMULATED_ATTACK not in names:
            raise ConfigError(
                f"expected simulated_attack for attacker_second_order, got objective={self.objective!r}: an attacker "
                "that goes on from step to step (imma) has no start to differentiate from."
            )
        if self.trainable != "lora" and not self.merge_lora:
            raise ConfigError(f"expected trainable=lora for merge_lora=false, got trainable={self.trainable!r}.")
        if self.trainable == "lora" and self.lora_rank < 1:
            raise ConfigError(f"expected lora_rank of at least 1 for trainable=lora, got {self.lora_rank}.")

    @property
    def _names(self) -> list[str]:
        return [name.strip() for name in self.objective.split("+")]

    @property
    def level_range(self) -> tuple[float, float]:
        """``site_levels`` as numbers. Raises ConfigError for other text."""
        try:
            low, high = (float(part) for part in self.site_levels.split(","))
        except ValueError as error:
            raise ConfigError(f"expected site_levels like '0.2,0.8', got {self.site_levels!r}.") from error
        if not 0 <= low < high <= 1:
            raise ConfigError(f"expected site_levels with 0 <= low < high <= 1, got {self.site_levels!r}.")
        return low, high

    @property
    def feature_objective(self) -> str:
        """``objective`` without attacks on the weights."""
        return "+".join(name for name in self._names if name not in (SIMULATED_ATTACK, IMMA))

    @property
    def simulates(self) -> bool:
        """Whether the objective has an attack on the weights."""
        return not {SIMULATED_ATTACK, IMMA}.isdisjoint(self._names)

    @property
    def attacker_goes_on(self) -> bool:
        """Whether the attacker keeps its factors from step to step (IMMA)."""
        return IMMA in self._names


def scientific_options(args: DiffusionImmunizationConfig) -> dict[str, Any]:
    """The options that can change the result: no paths, logging or hardware options."""
    return {name: value for name, value in asdict(args).items() if not _OPERATIONAL.match(name)}
