"""What ``last:N`` leaves trainable: the last stages of networks that have some, the last blocks of the others."""

from __future__ import annotations

import pytest
from torch import nn
from vision_builders import ARCHITECTURES, build_classifier

from hf_immunize.attacks.vision._blocks import block_sites, last_blocks
from hf_immunize.errors import ModelError
from hf_immunize.features import find_stages, find_trunk, trainable_modules

# Outermost modules of last:1, by hand from each architecture's code.
LAST = {
    "vit": "vit.layers.1 vit.layernorm classifier",
    "deit": "deit.layers.1 deit.layernorm classifier",
    "beit": "beit.layers.1 beit.layernorm beit.pooler classifier",
    "data2vec-vision": "data2vec_vision.encoder.layer.1 data2vec_vision.layernorm data2vec_vision.pooler classifier",
    "dinov2": "dinov2.encoder.layer.1 dinov2.layernorm classifier",
    "dinov2_with_registers": "dinov2_with_registers.encoder.layer.1 dinov2_with_registers.layernorm classifier",
    "dinov3_vit": "backbone.model.layer.1 backbone.norm classifier",
    "vit_msn": "vit.layers.1 vit.layernorm classifier",
    "ijepa": "ijepa.layers.1 ijepa.layernorm classifier",
    "clip": "vision_model.encoder.layers.1 vision_model.post_layernorm classifier",
    "metaclip_2": "vision_model.encoder.layers.1 vision_model.post_layernorm classifier",
    "siglip": "vision_model.encoder.layers.1 vision_model.post_layernorm vision_model.head classifier",
    "swin": "swin.encoder.layers.1 swin.layernorm swin.pooler classifier",
    "swinv2": "swinv2.encoder.layers.1 swinv2.layernorm swinv2.pooler classifier",
    "donut-swin": "donut.encoder.layers.1 donut.pooler classifier",
    "convnext": "convnext.encoder.stages.1 convnext.layernorm classifier",
    "convnextv2": "convnextv2.encoder.stages.1 convnextv2.layernorm classifier",
    "dinov3_convnext": "backbone.model.stages.1 backbone.layer_norm backbone.pool classifier",
    "resnet": "resnet.encoder.stages.1 resnet.pooler classifier",
    "bit": "bit.encoder.stages.1 bit.norm bit.pooler classifier",
    "regnet": "regnet.encoder.stages.1 regnet.pooler classifier",
    "hgnet_v2": "encoder.stages.1 avg_pool flatten fc classifier",
    # Flat lists of blocks: from the last one with a stride. MobileNetV1's is 13 pairs, the stride is in their first.
    "mobilenet_v1": "mobilenet_v1.layer.22 mobilenet_v1.layer.23 mobilenet_v1.layer.24 mobilenet_v1.layer.25 "
                    "mobilenet_v1.pooler dropout classifier",
    "mobilenet_v2": "mobilenet_v2.layer.12 mobilenet_v2.layer.13 mobilenet_v2.layer.14 mobilenet_v2.layer.15 "
                    "mobilenet_v2.conv_1x1 mobilenet_v2.pooler dropout classifier",
    "efficientnet": "efficientnet.encoder.blocks.1 efficientnet.encoder.top_conv efficientnet.encoder.top_bn "
                    "efficientnet.encoder.top_activation efficientnet.pooler dropout classifier",
    "mobilevit": "mobilevit.encoder.layer.4 mobilevit.conv_1x1_exp dropout classifier",
    "mobilevitv2": "mobilevitv2.encoder.layer.4 classifier",
    # The patch embedding of a stage lies in a list beside that of its blocks.
    "poolformer": "poolformer.encoder.block.1 poolformer.encoder.patch_embeddings.1 norm classifier",
    "pvt": "pvt.encoder.block.1 pvt.encoder.patch_embeddings.1 pvt.encoder.layer_norm classifier",
    "pvt_v2": "pvt_v2.encoder.layers.1 classifier",
    "segformer": "segformer.stages.1 classifier",
    "swiftformer": "swiftformer.encoder.network.6 norm head dist_head",
    "focalnet": "focalnet.encoder.stages.1 focalnet.layernorm focalnet.pooler classifier",
    "hiera": "hiera.encoder.stages.1 hiera.pooler classifier",
    "levit": "levit.encoder.stages.2 classifier",
    "cvt": "cvt.encoder.stages.1 layernorm classifier",
    "textnet": "textnet.encoder.stages.3 textnet.pooler avg_pool flatten fc classifier",
    "pp_lcnet": "encoder.blocks.4 avg_pool last_convolution act_fn flatten head",
    "perceiver": "perceiver.encoder.self_attends.1 perceiver.decoder",
}  # fmt: skip


def outermost(names: list[str]) -> list[str]:
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_stage_or_block_and_all_that_follows(name):
    assert outermost(trainable_modules(build_classifier(name), "last:1")) == LAST[name].split()


def test_stages_cover_the_trunk_once_and_in_order():
    for name, count in {"mobilenet_v2": 4, "mobilenet_v1": 5, "swin": 2, "poolformer": 2, "vit": 2}.items():
        model = build_classifier(name)
        trunk, container = find_trunk(model)
        stages = find_stages(model)
        assert len(stages) == count
        inside = [part for stage in stages for part in stage if part.startswith(f"{trunk}.")]
        assert inside == [f"{trunk}.{part}" for part, _ in container.named_children()]
    with pytest.raises(ModelError, match="at most 4 stages after 'last:', got 5: the trunk 'mobilenet_v2.layer'"):
        trainable_modules(build_classifier("mobilenet_v2"), "last:5")
    with pytest.raises(ModelError, match="expected at most 2 blocks after 'last:', got 3: the trunk 'vit.layers'"):
        trainable_modules(build_classifier("vit"), "last:3")


def block(width: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU())


def test_networks_of_the_users_own():
    """Sequentials at the root, around a backbone and in a head of more parameters than the trunk."""
    flat = nn.Sequential(block(4), block(4, 2), block(4), nn.Flatten(), nn.Linear(4, 3))
    assert find_trunk(flat)[0] == ""
    assert trainable_modules(flat, "last:1") == ["1", "2", "3", "4"]
    assert last_blocks(flat, 0.2) == [flat[4]] and block_sites(flat, "4") == ["1", "2", "3", "4"]
    wrapped = nn.Sequential(build_classifier("vit"), nn.Linear(3, 2))
    assert outermost(trainable_modules(wrapped, "last:1")) == ["0.vit.layers.1", "0.vit.layernorm", "0.classifier", "1"]
    heavy = build_classifier("vit")
    heavy.classifier = nn.Sequential(nn.Linear(8, 4096), nn.ReLU(), nn.Linear(4096, 3))
    assert outermost(trainable_modules(heavy, "last:1")) == ["vit.layers.1", "vit.layernorm", "classifier"]
    beside = nn.Module()  # SegFormer as it was: lists of embeddings, blocks and norms, one entry per stage
    beside.embeddings, beside.blocks, beside.norms, beside.head = (
        nn.ModuleList(nn.Conv2d(4, 4, 2) for _ in range(3)), nn.ModuleList(nn.ModuleList([block(4)]) for _ in range(3)),
        nn.ModuleList(nn.LayerNorm(4) for _ in range(3)), nn.Linear(4, 2),
    )  # fmt: skip
    assert trainable_modules(beside, "last:1") == ["blocks.2", "embeddings.2", "norms.2", "head"]


def test_numbered_lists_side_by_side_are_stages():
    """As timm lays a ResNet out: a stem of more than one layer, layer1 to layer4, pooling and head beside them."""
    net = nn.Module()
    net.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    for number in (1, 2, 3):
        net.add_module(f"layer{number}", nn.Sequential(*(block(4 * number) for _ in range(4 - number))))
    net.pool, net.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(12, 3)
    assert find_stages(net) == [["layer1"], ["layer2"], ["layer3"]]
    assert trainable_modules(net, "last:1") == ["layer3", "pool", "fc"]
    assert trainable_modules(net, "last:2") == ["layer2", "layer3", "pool", "fc"]
    with pytest.raises(ModelError, match="expected at most 3 stages"):
        trainable_modules(net, "last:4")
