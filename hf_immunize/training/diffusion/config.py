"""Options of a diffusion immunization run."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_immunize.errors import ConfigError
from hf_immunize.training.core.options import ImmunizationOptions, refuse_below, rename_option
from hf_immunize.training.diffusion.conditions import kinds_of

SIMULATED_ATTACK, IMMA = "simulated_attack", "imma"
_IMMA_RANK = 4
"""What diffusers' LoRA examples train, and IMMA's attackers with them."""
_OPERATIONAL = re.compile(
    r"^(output_dir|eval_batch_size|logging_.*|save_.*|validation_steps|probe_steps|report_to|disable_progress|use_cpu)$"
)
_OLD_NAMES = {"trainable", "max_loss_factor"}


@dataclass
class _Folder:
    output_dir: str = field(metadata={"help": "Folder for checkpoints and the finished pipeline."})


@dataclass
class DiffusionImmunizationConfig(ImmunizationOptions, _Folder):
    """Options of ``DiffusionImmunizationTrainer``; every option is explained in its own help text."""

    sites: str = field(
        default="attention,middle",
        metadata={
            "help": "Layers whose inputs are measured: 'attention' (q, k, v and out projections of every attention "
            "layer), 'middle' (features in the middle of the denoiser), or ends of module names, joined with commas. "
            "Inputs are averaged over tokens. Inputs the denoiser cannot change (text embeddings) are left out, and "
            "layers that read the same tensor count once."
        },
    )
    trainable_modules: str = field(
        default="all",
        metadata={
            "help": "Weights that are trained: 'all', 'attention' projections only, or 'lora' factors on these, which "
            "are merged in the end. imma, as it was published: attention where this and attacker_rank are not set, "
            "against an attacker of rank 4."
        },
    )
    max_primary_drop: float | None = field(
        default=None,
        metadata={
            "help": "Largest rise of the retain loss on eval_dataset above the base's, in percent (5: 1.05 times), on "
            "noise that never changes. The strength follows it, and the last weights that kept it are returned."
        },
    )
    per_device_harmful_batch_size: int = field(
        default=32, metadata={"help": "Harmful rows per device and micro-batch; spectra are of the global batch."}
    )
    site_levels: str = field(
        default="0,1",
        metadata={
            "help": "Range of noise levels, as shares of the schedule from clean to noisy, at which harmful features "
            "and simulated attacks are taken; each row draws its own level, uniformly."
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
    attacker_conditions: str = field(
        default="name",
        metadata={
            "help": "simulated_attack, imma: what an attack conditions on, drawn anew for each from these, joined with "
            "commas: name (the concept's own, and attacker_renamed), renamed (a retain row's), none (the empty prompt; "
            "zeros where a table of classes has no row for none), random (an embedding with the statistics of those "
            "that are known), mixed (between two known ones), learned (random, with an offset that he trains along)."
        },
    )
    attacker_ceiling: float = field(
        default=3.0,
        metadata={
            "help": "simulated_attack: the attacker's loss is pushed up to this multiple of the base's own loss on the "
            "concept, and no further."
        },
    )
    merge_lora: bool = field(
        default=True,
        metadata={
            "help": "trainable_modules=lora: merge the factors into the weights in the end. A base in bfloat16 rounds "
            "small updates away, and how much is said; false leaves PEFT's layers in the model, for save_lora_adapter."
        },
    )
    lora_rank: int = field(default=8, metadata={"help": "trainable_modules=lora: rank of the defender's factors."})
    min_snr_gamma: float | None = field(
        default=None, metadata={"help": "Min-SNR weighting of the retain loss with this gamma (5 is usual)."}
    )
    logit_normal: bool = field(
        default=False, metadata={"help": "Draw retain noise levels logit-normally, as SD3 and Flux are trained."}
    )
    max_steps: int = field(default=500, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Retain rows per device and micro-batch."})
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
    probe_steps: int = field(
        default=0,
        metadata={
            "help": "Classifiers alone; anything but 0 is refused. No attacker of a denoiser reads its features by a "
            "probe: the log's harmful_simulated_attack shows what attackers reach while training."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of rows, noise, levels and dropout."})
    report_to: str = field(default="none", metadata={"help": "Tracker for Accelerate, e.g. tensorboard."})
    disable_progress: bool = field(default=False, metadata={"help": "Hide the progress bar."})
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU even where there is a GPU."})

    trainable: str | None = field(default=None, metadata={"help": "Old name of trainable_modules."})
    max_loss_factor: float | None = field(
        default=None, metadata={"help": "Old form of max_primary_drop: 1.05 for 5 percent."}
    )

    def __post_init__(self) -> None:
        if self.eval_batch_size is None:
            self.eval_batch_size = self.per_device_train_batch_size
        rename_option(self, "trainable", "trainable_modules")
        if self.max_loss_factor is not None:
            if not 1 <= self.max_loss_factor < float("inf"):
                raise ConfigError(f"expected max_loss_factor of at least 1, and finite, got {self.max_loss_factor}.")
            self.max_loss_factor = round(100 * (self.max_loss_factor - 1), 9)
            rename_option(self, "max_loss_factor", "max_primary_drop")
        if IMMA in self.objectives and (self.trainable_modules, self.attacker_rank) == ("all", 0):
            self.trainable_modules, self.attacker_rank = "attention", _IMMA_RANK
        self.check_options()

    def check_options(self) -> None:
        """Raise ConfigError for values no run can use."""
        super().check_options()
        zero = ("weight_decay", "warmup_steps", "max_grad_norm", "save_steps", "validation_steps")
        one = (
            "max_steps", "gradient_accumulation_steps", "per_device_train_batch_size", "eval_batch_size", "eval_steps",
            "logging_steps", "save_total_limit",
        )
        refuse_below(self, dict.fromkeys(zero, 0) | dict.fromkeys(one, 1))
        for name in ("attacker_ceiling", "min_snr_gamma", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"expected {name} above 0, got {value}.")
        if self.primary_loss_weight == 0 and self.distillation == 0:
            raise ConfigError("expected something that keeps the model, got primary_loss_weight=distillation=0.")
        if self.mixed_precision not in ("no", "bf16"):
            raise ConfigError(
                f"expected mixed_precision 'no' or 'bf16', got {self.mixed_precision!r}: fp16 scales gradients, and "
                "the terms' gradients are added unscaled."
            )
        if self.trainable_modules not in ("all", "attention", "lora"):
            raise ConfigError(
                f"expected trainable_modules 'all', 'attention' or 'lora', got {self.trainable_modules!r}."
            )
        if self.probe_steps:
            raise ConfigError(
                f"expected no probe_steps for a pipeline, got {self.probe_steps}: a probe reads features of a "
                "classifier, and no attacker of a denoiser does. Watch harmful_simulated_attack in the log "
                "(objective=simulated_attack), and draw images by validation_steps."
            )
        self._check_attack()
        assert self.level_range

    def _check_attack(self) -> None:
        names = self.objectives
        if not 0 <= self.attacker_renamed <= 1:
            raise ConfigError(f"expected attacker_renamed between 0 and 1, got {self.attacker_renamed}.")
        if "learned" in kinds_of(self.attacker_conditions) and IMMA in names:
            raise ConfigError(
                "expected attacker_conditions without learned for imma, whose attacker goes on from step to step while "
                f"conditions change, got {self.attacker_conditions!r}: choose simulated_attack."
            )
        published = self.trainable_modules == "attention" and self.attacker_rank >= 1
        if IMMA in names and (not published or SIMULATED_ATTACK in names):
            raise ConfigError(
                "expected imma as it was published, with trainable_modules=attention, attacker_rank of at least 1 and "
                f"no simulated_attack beside it, got trainable_modules={self.trainable_modules!r}, "
                f"attacker_rank={self.attacker_rank}, objective={self.objective!r}."
            )
        if self.attacker_second_order and SIMULATED_ATTACK not in names:
            raise ConfigError(
                f"expected simulated_attack for attacker_second_order, got objective={self.objective!r}: an attacker "
                "that goes on from step to step (imma) has no start to differentiate from."
            )
        if self.trainable_modules != "lora" and not self.merge_lora:
            raise ConfigError(
                f"expected trainable_modules=lora for merge_lora=false, got trainable_modules="
                f"{self.trainable_modules!r}."
            )
        if self.trainable_modules == "lora" and self.lora_rank < 1:
            raise ConfigError(f"expected lora_rank of at least 1 for trainable_modules=lora, got {self.lora_rank}.")

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
    def attacker_goes_on(self) -> bool:
        """Whether the attacker keeps its factors from step to step (IMMA)."""
        return IMMA in self.objectives


def scientific_options(args: DiffusionImmunizationConfig) -> dict[str, Any]:
    """The options that can change the result: no paths, logging or hardware options."""
    found = {name: value for name, value in asdict(args).items() if not _OPERATIONAL.match(name)}
    return {name: value for name, value in found.items() if name not in _OLD_NAMES}
