"""Options of an immunization run, on top of ``transformers.TrainingArguments``."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_immunize.data import parse_augmentation
from hf_immunize.errors import ConfigError
from hf_immunize.training.vision.support import refuse_deepspeed, refuse_unsupported, use_one_device


@dataclass
class ImmunizationConfig(TrainingArguments):
    """``TrainingArguments`` with the options of immunization; every option is explained in its own help text."""

    objective: str = field(
        default="condition_number",
        metadata={
            "help": "What makes harmful fine-tuning slow: condition_number (R_ill on harmful and R_well on primary "
            "features, Zheng et al. 2025), ill_only (R_ill), opt_kappa (-log kappa on harmful, +log kappa on primary), "
            "group_kappa (-log kappa, mean over small groups of harmful rows), closed_form_adversary (held-out R2 of a "
            "ridge probe), imma (loss of an attacker that trains on, Zheng & Yeh 2024). Several are joined with '+'."
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
    horizon: str = field(
        default="100",
        metadata={
            "help": "closed_form_adversary: steps t of the simulated gradient-descent probe (ridge penalty sigma_1/t). "
            "Choose it so that the held-out R2 starts above 0. Several, joined with commas, are averaged."
        },
    )
    attacker_steps: int = field(
        default=4, metadata={"help": "imma: attacker steps per defender step; the attacker is kept between steps."}
    )
    attacker_lora_rank: int = field(
        default=0,
        metadata={
            "help": "imma: rank of LoRA updates of attention that the attacker trains beside its classifier, one step "
            "per defender step, at one more forward and backward over the harmful rows. 0: classifier only."
        },
    )
    attacker_lora_rate: float = field(default=1e-3, metadata={"help": "imma: AdamW learning rate of these updates."})
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
    trainable_modules: str | None = field(
        default=None,
        metadata={
            "help": "What is trained; all else is frozen and runs without autograd, in evaluation mode. Names or "
            "dotted ends of names joined with commas, one regular expression over whole names, or 'last:N' for the "
            "trunk's last N stages (a ViT's blocks) and all that follows it. Default: whatever requires a gradient."
        },
    )
    cache_frozen_features: bool = field(
        default=False,
        metadata={
            "help": "Compute the activations that enter the trainable part once, keep them on disk, and start every "
            "forward there. Needs a frozen part and no augmentation."
        },
    )
    feature_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the cached activations. Default: in the Hugging Face cache."}
    )
    augmentation: str | None = field(
        default=None,
        metadata={
            "help": "Random changes to training images of both tasks, as tensors: any of flip, crop, color, erase, "
            "joined with commas. Drawn per row and step from data_seed, the same on any number of processes."
        },
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Decay of a moving average of the trained weights, evaluated, guarded and returned. 0: off."
        },
    )
    distillation: float = field(
        default=0.0, metadata={"help": "Weight of KL(model before immunization || model) on primary rows. 0: off."}
    )
    feature_distillation: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the mean of |phi - phi_0|^2 / |phi_0|^2 over primary rows, phi the head's input and "
            "phi_0 that of the model before immunization. Holds what logits do not show. 0: off."
        },
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
        metadata={
            "help": "Evaluation metric (0..1, higher is better) that max_primary_drop is measured on. 'accuracy' means "
            "r2 for a regression head."
        },
    )
    max_strength_factor: float = field(
        default=8.0, metadata={"help": "How far above `strength` the guard may raise it while there is room."}
    )
    learning_rate: float = field(
        default=3e-4,
        metadata={"help": "Initial learning rate. TrainingArguments' own default, 5e-5, hardly moves a term."},
    )
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Primary rows per device and micro-batch."}
    )
    per_device_harmful_batch_size: int = field(
        default=128, metadata={"help": "Harmful rows per device and micro-batch; spectra are of the global batch."}
    )
    dataloader_timeout: float = field(
        default=600.0,
        metadata={"help": "Seconds that data workers may take for a batch before the run stops with an error. 0: any."},
    )
    harmful_classes_per_batch: int | None = field(
        default=None, metadata={"help": "Classes in one harmful batch (a few-shot episode). Default: all classes."}
    )
    feature_module: str | None = field(
        default=None,
        metadata={"help": "The head: module whose input records and probes measure. Default: the linear classifier."},
    )
    sites: str = field(
        default="head",
        metadata={
            "help": "Layers whose inputs are regularized: head, lora (query and value projections, else every linear "
            "layer but the head), or module names as for trainable_modules. Tokens, positions and windows are averaged."
        },
    )
    site_layouts: str | None = field(
        default=None,
        metadata={
            "help": "Axes of single sites' inputs where they should not be found, e.g. 'attention.q_proj=(n k) t d': n "
            "images, d features, all else is averaged; (n k): k windows per image; 'n 0 d': the first token alone."
        },
    )
    site_weights: str | None = field(
        default=None,
        metadata={"help": "Weight of single sites, e.g. 'classifier=1,layers.3.mlp.fc1=0.2'; else 1/number of sites."},
    )
    feature_bank_rows: int = field(
        default=0,
        metadata={
            "help": "Features of past steps that are measured along with each batch, without gradient; for spectra of "
            "features wider than the batch. Rows per site and side, on every device. 0: off."
        },
    )
    precondition_gradients: str | None = field(
        default=None,
        metadata={
            "help": "Linear layers (names as for trainable_modules) at which the terms' weight gradients are "
            "multiplied by the inverse second moment of the layer's inputs, as in Algorithm 1. For layers "
            "right before a site."
        },
    )
    precondition_ridge: float = field(
        default=1e-3, metadata={"help": "Ridge of that inverse, relative to the mean eigenvalue of the moment."}
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
        refuse_deepspeed(self)
        if self.max_primary_drop is not None and str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            self.eval_strategy = "steps"
            self.eval_steps = self.eval_steps or 0.1  # a share of all steps: a short run is guarded as well
        super().__post_init__()
        use_one_device(self)
        self._validate_immunization()

    @property
    def horizons(self) -> tuple[float, ...]:
        """``horizon`` as numbers."""
        try:
            found = tuple(float(part) for part in str(self.horizon).split(","))
        except ValueError as error:
            raise ConfigError(f"expected horizon like '100' or '30,1000', got {self.horizon!r}.") from error
        if not all(horizon > 0 for horizon in found):
            raise ConfigError(f"expected a positive horizon in steps, got {self.horizon}.")
        return found

    def _validate_immunization(self) -> None:
        held = ("primary_loss_weight", "distillation", "feature_distillation")
        at_least = {name: 0 for name in ("strength", "memorization", *held)}
        at_least |= {"harmful_group_rows": 3, "attacker_steps": 1, "feature_bank_rows": 0, "precondition_ridge": 0}
        at_least |= {"dataloader_timeout": 0, "attacker_lora_rank": 0, "attacker_lora_rate": 0}
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                raise ConfigError(f"expected {name} of at least {least}, got {getattr(self, name)}.")
        assert self.horizons
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"expected ema_decay in [0, 1), got {self.ema_decay}.")
        if self.max_primary_drop is not None and not self.max_primary_drop >= 0:
            raise ConfigError(f"expected max_primary_drop of at least 0 points, got {self.max_primary_drop}.")
        if self.load_best_model_at_end and (self.max_primary_drop is not None or self.ema_decay):
            raise ConfigError(
                "expected max_primary_drop or ema_decay, or load_best_model_at_end, got both: guard and average "
                "already choose the weights that are returned. Turn load_best_model_at_end off."
            )
        if self.primary_loss_weight == self.distillation == self.feature_distillation == 0:
            raise ConfigError(
                "expected something that keeps the primary task, got primary_loss_weight=distillation="
                "feature_distillation=0."
            )
        if self.augmentation is not None:
            parse_augmentation(self.augmentation)
        refuse_unsupported(self)
