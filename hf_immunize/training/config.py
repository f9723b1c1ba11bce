"""Options of an immunization run, on top of ``transformers.TrainingArguments``."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_immunize.errors import ConfigError


@dataclass
class ImmunizationConfig(TrainingArguments):
    """``TrainingArguments`` with the options of immunization; every option is explained in its own help text."""

    objective: str = field(
        default="condition_number",
        metadata={
            "help": "What makes harmful fine-tuning slow: condition_number (R_ill on harmful and R_well on primary "
            "features, Zheng et al. 2025), ill_only (R_ill), opt_kappa (-log kappa on harmful, +log kappa on primary), "
            "group_kappa (-log kappa, mean over small groups of harmful rows), closed_form_adversary (held-out R2 of a "
            "ridge probe). Several are joined with '+'."
        },
    )
    weight: str = field(
        default="auto",
        metadata={
            "help": "Weight of each term. 'auto' balances gradient norms at the features: every term pushes with "
            "strength x the gradient norm of a fully wrong primary batch. A number, or term=number pairs joined with "
            "commas, fixes the weights; strength is then a plain factor."
        },
    )
    strength: float = field(
        default=0.1, metadata={"help": "The one knob: factor on all harmful and primary terms. 0 turns them off."}
    )
    term_shares: str | None = field(
        default=None,
        metadata={"help": "Relative strength of single terms, e.g. 'primary_log_kappa=0.1'; 1 if not named."},
    )
    horizon: float = field(
        default=100.0,
        metadata={
            "help": "closed_form_adversary: steps t of the simulated gradient-descent probe (ridge penalty sigma_1/t). "
            "Choose it so that the held-out R2 starts above 0."
        },
    )
    memorization: float = field(
        default=0.0,
        metadata={"help": "closed_form_adversary: weight of the probe's R2 on its own support rows."},
    )
    harmful_group_rows: int = field(
        default=32,
        metadata={
            "help": "group_kappa: rows per group. n centred rows span n-1 directions, those of the most energy, so "
            "that small groups raise kappa along the directions an attacker uses first."
        },
    )
    distillation: float = field(
        default=0.0, metadata={"help": "Weight of KL(model before immunization || model) on primary rows. 0: off."}
    )
    primary_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the primary task's own loss; 0 trains on distillation alone."}
    )
    max_primary_drop: float | None = field(
        default=None,
        metadata={
            "help": "Largest loss of the primary metric against the model before immunization, in points, on "
            "eval_dataset. The trainer lowers the strength when it is exceeded, raises it when there is room, and "
            "returns the last weights that kept it."
        },
    )
    guard_metric: str = field(
        default="accuracy",
        metadata={"help": "Evaluation metric (0..1, higher is better) that max_primary_drop is measured on."},
    )
    max_strength_factor: float = field(
        default=8.0, metadata={"help": "How far above `strength` the guard may raise it while there is room."}
    )
    per_device_harmful_batch_size: int = field(
        default=64, metadata={"help": "Harmful rows per device and micro-batch; spectra are of the global batch."}
    )
    harmful_classes_per_batch: int | None = field(
        default=None, metadata={"help": "Classes in one harmful batch (a few-shot episode). Default: all classes."}
    )
    feature_module: str | None = field(
        default=None,
        metadata={"help": "Module whose input is regularized. Default: the linear classification head."},
    )
    freeze_norm_statistics: bool = field(
        default=True,
        metadata={
            "help": "Keep BatchNorm running statistics as they are. When false they learn from primary rows only; "
            "harmful rows never update them."
        },
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN and infinite losses from the log."})

    def __post_init__(self) -> None:
        if self.max_primary_drop is not None and str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            self.eval_strategy = "steps"
            self.eval_steps = self.eval_steps or 50
        super().__post_init__()
        self._validate_immunization()

    def _validate_immunization(self) -> None:
        for name in ("strength", "distillation", "primary_loss_weight", "memorization"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"expected {name} of at least 0, got {getattr(self, name)}.")
        if self.harmful_group_rows < 3:
            raise ConfigError(f"expected harmful_group_rows of at least 3, got {self.harmful_group_rows}.")
        if not self.horizon > 0:
            raise ConfigError(f"expected a positive horizon in steps, got {self.horizon}.")
        if self.max_primary_drop is not None and not self.max_primary_drop >= 0:
            raise ConfigError(f"expected max_primary_drop of at least 0 points, got {self.max_primary_drop}.")
        if self.max_primary_drop is not None and self.load_best_model_at_end:
            raise ConfigError(
                "expected max_primary_drop or load_best_model_at_end, got both: the guard already chooses the weights "
                "that are returned. Turn load_best_model_at_end off."
            )
        if self.primary_loss_weight == 0 and self.distillation == 0:
            raise ConfigError("expected something that keeps the primary task, got primary_loss_weight=distillation=0.")
        if self.deepspeed is not None:
            raise ConfigError(
                "expected no DeepSpeed: its engine runs backward on its own and has not been shown to give the "
                "gradient of the global batch. Use DDP or FSDP2."
            )
