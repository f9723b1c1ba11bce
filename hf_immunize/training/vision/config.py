"""Options of an immunization run, on top of ``transformers.TrainingArguments``."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_immunize.data import parse_augmentation
from hf_immunize.errors import ConfigError
from hf_immunize.training.core.options import ImmunizationOptions, refuse_below, rename_option
from hf_immunize.training.vision.attackers import check_attacker
from hf_immunize.training.vision.support import refuse_deepspeed, refuse_unsupported, use_one_device

ON_FEATURES = frozenset({"condition_number", "ill_only", "opt_kappa", "group_kappa", "closed_form_adversary"})
"""Objectives that change features at the head, for which a large model's last stage is enough."""


@dataclass
class ImmunizationConfig(ImmunizationOptions, TrainingArguments):
    """``TrainingArguments`` with the options of immunization; every option is explained in its own help text."""

    strength: float = field(
        default=None,  # type: ignore[assignment]  # a number from when there is a model
        metadata={
            "help": "The one knob: factor on all immunization terms. 0 turns them off. With max_primary_drop it is "
            "where the strength starts; without, lower it where the primary task loses too much. Default: 0.5, or 5 "
            "where distillation is 10 by default and weight is auto."
        },
    )
    memorization: float = field(
        default=0.5,
        metadata={"help": "closed_form_adversary: weight of the probe's R2 on its own support rows. With few rows of "
                          "many classes R2 on other rows is below 0, where it has no gradient."},
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
    attacker_head: str = field(
        default="refitted",
        metadata={
            "help": "simulated_attack: refitted, whose error is that of a ridge head solved at every step on half of "
            "the rows; fresh, a random one that the attacker trains along with the rest."
        },
    )
    attacker_norms: str = field(
        default="frozen",
        metadata={
            "help": "Objectives with simulated attackers: BatchNorm of the attacked copy uses its frozen running "
            "statistics, or those of the batch (batch), as fine-tuning does. Neither is learned."
        },
    )
    attacker_resets: int = field(
        default=0,
        metadata={
            "help": "The same: before he starts, an attacker draws his last n blocks anew, n at random in 0 to this "
            "(never the head). Needs attacker_rank=0."
        },
    )
    attacker_depths: str | None = field(
        default=None,
        metadata={
            "help": "simulated_attack with a refitted head: layers at whose inputs the attacked model's error is held "
            "up (names as for sites), averaged with equal weights. Default: the head's input alone."
        },
    )
    attacker_second_order: bool = field(
        default=False,
        metadata={
            "help": "simulated_attack with a refitted head: the exact gradient through the attacker's steps, of a "
            "smoothed AdamW, on one process. Default: to first order."
        },
    )
    distillation: float = field(
        default=None,  # type: ignore[assignment]  # a number from when there is a model
        metadata={
            "help": "Weight of the distance to the answers of the model before immunization on primary rows. Default: "
            "0; 10 for a classifier that knows its task, with closed_form_adversary, or with a million weights or more "
            "and another objective on features."
        },
    )
    feature_distillation: float = field(
        default=None,  # type: ignore[assignment]  # a number from when there is a model
        metadata={
            "help": "Weight of the mean of |phi - phi_0|^2 / |phi_0|^2 over primary rows, phi the head's input and "
            "phi_0 that of the model before immunization. Holds what logits do not show. 0: off. Default: 0, or 6 "
            "for a classifier of a million weights or more that knows its task, with objectives on features."
        },
    )
    guard_metric: str = field(
        default="accuracy",
        metadata={
            "help": "Evaluation metric (0..1, higher is better) that max_primary_drop is measured on. 'accuracy' means "
            "r2 for a regression head."
        },
    )
    probe_steps: int = field(
        default=0,
        metadata={
            "help": "Steps between two looks of a ridge probe at held-out harmful rows (harmful_eval_dataset, split "
            "'probe' of harmful_splits; without them at those that are trained on), logged as harmful_probe. Decides "
            "nothing. 0: off."
        },
    )
    learning_rate: float = field(
        default=None,  # type: ignore[assignment]  # a number from when there is a model
        metadata={
            "help": "Initial learning rate. Default: 3e-4; with closed_form_adversary the rate at which a first step "
            "changes the answer to an image by 60 percent, within 5e-5 to 3e-3: what ruins a deep network hardly moves "
            "a narrow one."
        },
    )
    per_device_harmful_batch_size: int = field(
        default=None,  # type: ignore[assignment]  # a number from __post_init__ on
        metadata={
            "help": "Harmful rows per device and micro-batch; spectra are of the global batch. Default: 128, and 256 "
            "with closed_form_adversary, whose probe is fitted on half of them: on few it finds less than an attacker."
        },
    )
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Primary rows per device and micro-batch."}
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
    site_weights: str | None = field(
        default=None,
        metadata={"help": "Weight of single sites, e.g. 'classifier=1,layers.3.mlp.fc1=0.2'; else 1/number of sites."},
    )
    feature_bank_rows: int = field(
        default=0,
        metadata={
            "help": "Features of past steps that are measured along with each batch, without gradient; for spectra of "
            "features wider than the batch. Rows per site and task, on every device. 0: off."
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

    attacker_lora_rank: int = field(default=0, metadata={"help": "Old name of attacker_rank."})
    attacker_lora_rate: float | None = field(default=None, metadata={"help": "Old name of attacker_learning_rate."})

    def __post_init__(self) -> None:
        refuse_below(self, {"attacker_lora_rank": 0, "attacker_lora_rate": 0} if self.attacker_lora_rate else
                     {"attacker_lora_rank": 0})
        rename_option(self, "attacker_lora_rank", "attacker_rank", unset=0)
        rename_option(self, "attacker_lora_rate", "attacker_learning_rate")
        refuse_deepspeed(self)
        self._fill_in()
        if self.max_primary_drop is not None and str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            self.eval_strategy = "steps"
            self.eval_steps = self.eval_steps or 0.1  # a share of all steps: a short run is guarded as well
        super().__post_init__()
        use_one_device(self)
        self.check_options()

    def _fill_in(self) -> None:
        """Defaults that follow the objective; those that follow the model stay open until there is one."""
        probed = "closed_form_adversary" in self.objectives
        if self.per_device_harmful_batch_size is None:
            self.per_device_harmful_batch_size = 256 if probed else 128
        if self.learning_rate is None and not probed:
            self.learning_rate = 3e-4
        if not ON_FEATURES.issuperset(self.objectives):
            self.strength = 0.5 if self.strength is None else self.strength
            self.distillation = self.distillation or 0.0
            self.feature_distillation = self.feature_distillation or 0.0

    def check_options(self) -> None:
        """Raise ConfigError for values no run can use."""
        super().check_options()
        check_attacker(self)
        names = ("memorization", "feature_distillation", "feature_bank_rows", "precondition_ridge", "probe_steps")
        refuse_below(self, dict.fromkeys((*names, "dataloader_timeout"), 0))
        if self.load_best_model_at_end and (self.max_primary_drop is not None or self.ema_decay):
            raise ConfigError(
                "expected max_primary_drop or ema_decay, or load_best_model_at_end, got both: guard and average "
                "already choose the weights that are returned. Turn load_best_model_at_end off."
            )
        if not (self.primary_loss_weight or self.distillation or self.feature_distillation):
            raise ConfigError(
                "expected something that keeps the primary task, got primary_loss_weight=distillation="
                "feature_distillation=0."
            )
        if self.augmentation is not None:
            parse_augmentation(self.augmentation)
        refuse_unsupported(self)
