"""One tiny random model of each architecture, by its config alone: no code depends on which one it is."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

SIZE = 16
"""Side of the images."""

_TRANSFORMER = {
    "image_size": SIZE,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_DINO = {name: value for name, value in _TRANSFORMER.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
_SWIN = {
    "image_size": SIZE,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 2,
    "drop_path_rate": 0.0,
}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_PAIR = {"vision_config": _TRANSFORMER, "text_config": _TEXT}

CONFIGS: dict[str, dict] = {
    "vit": _TRANSFORMER,
    "deit": _TRANSFORMER | {"architectures": ["DeiTForImageClassification"]},  # two classes of heads: which one
    "dinov2": _DINO,
    "dinov2_with_registers": _DINO,
    "swin": _SWIN,
    "swinv2": _SWIN,
    "convnext": _STAGES | {"num_stages": 2},
    "resnet": _STAGES | {"embedding_size": 8, "layer_type": "basic"},
    "regnet": _STAGES | {"embedding_size": 8, "groups_width": 4},
    "mobilenet_v2": {"image_size": SIZE, "depth_multiplier": 0.25, "depth_divisible_by": 4, "min_depth": 4,
                     "classifier_dropout_prob": 0.0},
    "efficientnet": {"image_size": SIZE, "width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320,
                     "kernel_sizes": [3, 3], "in_channels": [32, 32], "out_channels": [32, 64], "strides": [1, 2],
                     "num_block_repeats": [1, 1], "expand_ratios": [1, 2], "dropout_rate": 0.0,
                     "drop_connect_rate": 0.0},
    "beit": _TRANSFORMER | {"drop_path_rate": 0.0},
    "clip": _PAIR,
    "siglip": _PAIR,
}  # fmt: skip


def tiny_config(name: str, labels: int = 3, **options):
    """Config of one row of the table."""
    return AutoConfig.for_model(name, num_labels=labels, **(CONFIGS.get(name, _TRANSFORMER) | options))


def tiny_classifier(name: str, labels: int = 3, **options) -> nn.Module:
    """A classifier with random weights, the same ones every time."""
    torch.manual_seed(0)
    return settled(AutoModelForImageClassification.from_config(tiny_config(name, labels, **options)))


def tiny_backbone(name: str, **options) -> nn.Module:
    """A model without a head."""
    torch.manual_seed(0)
    return settled(AutoModel.from_config(tiny_config(name, **options)))


@torch.no_grad()
def settled(model: nn.Module) -> nn.Module:
    """The model with BatchNorm statistics of what passes; with those of its birth, deep features are all but zero."""
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        model.train()
        for _ in range(10):
            model(pixel_values=torch.randn(16, 3, SIZE, SIZE))
    return model
