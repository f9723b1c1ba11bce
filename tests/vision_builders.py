"""A tiny random image classifier of many architectures. Random weights exercise code; they support no claim."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from hf_immunize import add_head

_BLOCKS = {
    "image_size": 16, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 16,
}
_RATIO = {name: value for name, value in _BLOCKS.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
_SWIN = {
    "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4,
    "drop_path_rate": 0.0,
}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 2]}
_TEXT = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 8,
    "bos_token_id": 0, "eos_token_id": 1, "projection_dim": 8,
}
_PAIR = {"vision_config": _BLOCKS, "text_config": _TEXT}
_PYRAMID = {
    "image_size": 32, "num_encoder_blocks": 2, "depths": [1, 2], "hidden_sizes": [8, 16],
    "num_attention_heads": [1, 2], "strides": [4, 2], "patch_sizes": [7, 3], "mlp_ratios": [2, 2],
    "drop_path_rate": 0.0,
}
_MOBILE = {"image_size": 32, "depth_multiplier": 0.25, "min_depth": 4}

# model type: options of its config
ARCHITECTURES: dict[str, dict] = {
    "vit": _BLOCKS,
    "deit": _BLOCKS | {"architectures": ["DeiTForImageClassification"]},  # two classes of heads: which one
    "beit": _BLOCKS | {"drop_path_rate": 0.0},
    "data2vec-vision": _BLOCKS | {"drop_path_rate": 0.0},
    "dinov2": _RATIO,
    "dinov2_with_registers": _RATIO,
    "dinov3_vit": _BLOCKS,
    "vit_msn": _BLOCKS,
    "ijepa": _BLOCKS,
    "clip": _PAIR,
    "metaclip_2": _PAIR,
    "siglip": _PAIR,
    "swin": _SWIN,
    "swinv2": _SWIN,
    "donut-swin": _SWIN,
    "convnext": _STAGES | {"num_stages": 2},
    "convnextv2": _STAGES | {"num_stages": 2},
    "dinov3_convnext": _STAGES,
    "resnet": _STAGES | {"embedding_size": 8, "layer_type": "basic"},
    "bit": _STAGES | {"embedding_size": 8, "num_groups": 4, "layer_type": "preactivation"},
    "regnet": {"hidden_sizes": [16, 32], "depths": [1, 2], "embedding_size": 8, "groups_width": 4},
    "hgnet_v2": {
        "embedding_size": 8, "depths": [1, 1], "hidden_sizes": [8, 16], "stem_channels": [3, 4, 8],
        "stage_in_channels": [8, 8], "stage_mid_channels": [4, 4], "stage_out_channels": [8, 16],
        "stage_num_blocks": [1, 1], "stage_downsample": [False, True], "stage_light_block": [False, True],
        "stage_kernel_size": [3, 3], "stage_numb_of_layers": [2, 2], "stage_downsample_strides": [2, 2],
    },
    "mobilenet_v1": _MOBILE,
    "mobilenet_v2": _MOBILE | {"depth_divisible_by": 4},
    "mobilevit": {
        "image_size": 64, "hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [4, 4, 4, 8, 8, 8, 8],
        "num_attention_heads": 2, "expand_ratio": 2.0,
    },
    "mobilevitv2": {"image_size": 64, "n_attn_blocks": [1, 1, 1], "base_attn_unit_dims": [8, 8, 8],
                    "width_multiplier": 0.125},
    "efficientnet": {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320,
                     "kernel_sizes": [3, 3], "in_channels": [32, 32], "out_channels": [32, 64], "strides": [1, 2],
                     "num_block_repeats": [1, 1], "expand_ratios": [1, 2], "dropout_rate": 0.0,
                     "drop_connect_rate": 0.0},
    "poolformer": _PYRAMID | {"padding": [2, 1]},
    "pvt": _PYRAMID | {"patch_sizes": [4, 2], "sequence_reduction_ratios": [2, 1]},
    "pvt_v2": _PYRAMID | {"sr_ratios": [2, 1]},
    "segformer": _PYRAMID | {"sr_ratios": [2, 1]},
    "swiftformer": {"image_size": 32, "depths": [1, 1, 1, 1], "embed_dims": [8, 8, 8, 8], "mlp_ratio": 2},
    "focalnet": {"image_size": 16, "patch_size": 2, "embed_dim": 8, "hidden_sizes": [8, 16], "depths": [1, 2],
                 "focal_levels": [2, 2], "focal_windows": [3, 3], "mlp_ratio": 2.0, "drop_path_rate": 0.0},
    "hiera": {"image_size": [32, 32], "patch_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1],
              "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "num_query_pool": 1, "masked_unit_size": [4, 4],
              "masked_unit_attention": [True, False], "mlp_ratio": 2.0},
    "levit": {"image_size": 32, "patch_size": 16, "hidden_sizes": [8, 12, 16], "num_attention_heads": [1, 2, 2],
              "depths": [1, 1, 1], "key_dim": [4, 4, 4], "architectures": ["LevitForImageClassification"]},
    "cvt": {"num_channels": 3, "patch_sizes": [7, 3], "patch_stride": [4, 2], "patch_padding": [2, 1],
            "embed_dim": [8, 16], "num_heads": [1, 2], "depth": [1, 2], "mlp_ratio": [2.0, 2.0],
            "attention_drop_rate": [0.0, 0.0], "drop_rate": [0.0, 0.0], "drop_path_rate": [0.0, 0.0],
            "qkv_bias": [True, True], "cls_token": [False, True], "qkv_projection_method": ["dw_bn", "dw_bn"],
            "kernel_qkv": [3, 3], "padding_kv": [1, 1], "stride_kv": [2, 2], "padding_q": [1, 1], "stride_q": [1, 1]},
    "textnet": {"image_size": 32, "stem_out_channels": 4, "hidden_sizes": [4, 8, 8, 16, 16],
                "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3], [1, 3]], [[3, 3]], [[3, 3]]],
                "conv_layer_strides": [[2], [2, 1], [2], [2]]},
    "pp_lcnet": {"scale": 0.25, "class_expand": 16},
    "perceiver": {"num_latents": 6, "d_latents": 8, "num_blocks": 1, "num_self_attends_per_block": 2,
                  "num_self_attention_heads": 2, "num_cross_attention_heads": 1, "image_size": 16,
                  "architectures": ["PerceiverForImageClassificationLearned"]},
}  # fmt: skip

HEADS = {"swiftformer": "head", "perceiver": "perceiver.decoder.decoder.final_layer"}
"""Heads of models in which they are not the one linear layer with as many outputs as labels."""


def image_size(name: str) -> int:
    """Side of the images of one architecture."""
    size = ARCHITECTURES[name].get("image_size") or ARCHITECTURES[name].get("vision_config", {}).get("image_size", 32)
    return size[0] if isinstance(size, list) else size


def build_classifier(name: str, labels: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A classifier with random weights, the same ones every time, in evaluation mode."""
    config = AutoConfig.for_model(name, num_labels=labels, **ARCHITECTURES[name])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if type(config) in AutoModelForImageClassification._model_mapping:
            model = AutoModelForImageClassification.from_config(config)
        else:
            model = add_head(AutoModel.from_config(config), labels)
        for parameter in model.parameters():  # as far from zero as a trained one's: nothing fades on the way
            fan_in = max(parameter.numel() // max(len(parameter), 1), 1) if parameter.dim() > 1 else 4
            nn.init.normal_(parameter, std=fan_in**-0.5)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = None
        model.train()
        model(pixel_values=torch.randn(8, 3, image_size(name), image_size(name)))
    return model.eval().to(dtype)
