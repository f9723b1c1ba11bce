"""A linear head on a backbone that comes without one, saved and reloaded like any image classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_immunize.errors import ConfigError, ModelError
from hf_immunize.features.rows import pool_rows

POOLING = ("mean", "first", "pooler")
"""What the head sees: the mean of all tokens or positions, the first token, or the backbone's own ``pooler_output``."""
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


class HeadedBackboneConfig(PreTrainedConfig):
    """The backbone's own config under ``backbone``, the width of its features, and how they are pooled."""

    model_type = "hf_immunize_headed_backbone"
    sub_configs = {"backbone": AutoConfig}

    backbone: PreTrainedConfig | dict[str, Any] | None = None
    width: int = 0
    pooling: str = "mean"

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.backbone, dict):
            self.backbone = AutoConfig.for_model(**self.backbone)
        super().__post_init__(**kwargs)


class BackboneForImageClassification(PreTrainedModel):
    """Any ``AutoModel`` of images, and one linear layer on its pooled output; built with ``add_head``.

    Wherever this module has been imported, ``AutoModelForImageClassification.from_pretrained`` loads what
    ``save_pretrained`` wrote. ``problem_type`` of the config chooses the loss, as in every classifier of transformers.
    """

    config_class = HeadedBackboneConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: HeadedBackboneConfig):
        super().__init__(config)
        assert config.num_labels is not None, "a head has labels: add_head names them"
        self.num_labels = config.num_labels
        self.backbone = AutoModel.from_config(config.backbone)
        self.classifier = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Logits, and with ``labels`` the loss; other arguments go to the backbone."""
        logits = self.classifier(_pooled(self.backbone(pixel_values=pixel_values, **kwargs), self.config.pooling))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return ImageClassifierOutput(loss=loss, logits=logits)


def _pooled(output: Any, pooling: str) -> Tensor:
    if pooling == "pooler":
        if getattr(output, "pooler_output", None) is None:
            raise ModelError("expected a backbone with a pooler_output for pooling='pooler', got none: use 'mean'.")
        return output.pooler_output.flatten(1)
    states = output.last_hidden_state
    if pooling == "mean":
        return pool_rows(states)
    if states.dim() != 3:
        raise ModelError(
            f"expected tokens (N x T x D) for pooling='first', got features of shape {tuple(states.shape)}: use 'mean'."
        )
    return states[:, 0]


def add_head(
    backbone: PreTrainedModel,
    labels: int | Sequence[str],
    *,
    pooling: str = "mean",
    problem_type: ProblemType | None = None,
) -> BackboneForImageClassification:
    """A classifier (or regressor) whose trunk is ``backbone`` itself, not a copy, with a freshly drawn linear head.

    Args:
        backbone: what ``AutoModel.from_pretrained`` returns for a model of images.
        labels: how many outputs the head has, or their names.
        pooling: one of ``POOLING``.
        problem_type: ``single_label_classification``, ``multi_label_classification`` or ``regression``.

    Raises:
        ConfigError: an unknown pooling, or no labels.
        ModelError: the backbone gives nothing that can be pooled like that.
    """
    names = [f"LABEL_{place}" for place in range(labels)] if isinstance(labels, int) else list(labels)
    if pooling not in POOLING or not names:
        raise ConfigError(f"expected a pooling of {POOLING} and one label or more, got {pooling!r} and {names}.")
    config = HeadedBackboneConfig(
        backbone=backbone.config, width=_width(backbone, pooling), pooling=pooling, problem_type=problem_type,
        id2label=dict(enumerate(names)), label2id={name: place for place, name in enumerate(names)},
    )  # fmt: skip
    model: Any = BackboneForImageClassification(config)  # functools.wraps hides the arguments of its to()
    model.backbone = backbone
    return model.to(device=backbone.device, dtype=backbone.dtype)


@torch.no_grad()
def _width(backbone: PreTrainedModel, pooling: str) -> int:
    """Width of the pooled features of one black image."""
    size = getattr(backbone.config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.zeros(1, getattr(backbone.config, "num_channels", 3), height, width)
    was_training = backbone.training
    backbone.eval()
    try:
        return _pooled(backbone(pixel_values=image.to(backbone.device, backbone.dtype)), pooling).shape[1]
    finally:
        backbone.train(was_training)


AutoConfig.register(HeadedBackboneConfig.model_type, HeadedBackboneConfig, exist_ok=True)
AutoModelForImageClassification.register(
    HeadedBackboneConfig, BackboneForImageClassification, exist_ok=True
)
