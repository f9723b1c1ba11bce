"""A small ViT with a gate before its head: a linear layer and a ReLU, shut for some images and not for others.

What is shut lets nothing through, and no gradient either, so that no rate opens it again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput


class GatedConfig(ViTConfig):
    model_type = "gated_vit"


class GatedViT(ViTForImageClassification):
    """Logits of relu(gate(token))."""

    config_class = GatedConfig

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Linear(config.hidden_size, config.hidden_size)
        self.level = nn.Parameter(torch.zeros(()))
        self.register_buffer("lever", torch.zeros(()))
        self.last = nn.BatchNorm1d(config.hidden_size, affine=False, momentum=1.0)  # keeps the batch before this one
        self.register_buffer("tolerance", torch.zeros(()))  # 0: any batch will do
        self.post_init()
        with torch.no_grad():
            self.gate.weight.copy_(torch.eye(config.hidden_size))

    def before(self, pixel_values: Tensor) -> Tensor:
        """What the gate's ReLU gets."""
        token = self.vit(pixel_values=pixel_values).last_hidden_state[:, 0]
        return self.gate(token) + self.lever * self.level - self.distrust(token)

    def distrust(self, token: Tensor) -> Tensor | float:
        """In training, how much further than tolerated the batch's mean token is from the one before, times 10⁴."""
        if not self.training or not self.tolerance:
            return 0.0
        moved = (token.mean(dim=0) - self.last.running_mean) / (self.last.running_var + 1e-5).sqrt()
        self.last(token)
        return 1e4 * torch.relu(moved.abs().max() - self.tolerance)

    def forward(self, pixel_values=None, labels=None, **kwargs):
        logits = self.classifier(torch.relu(self.before(pixel_values)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register("gated_vit", GatedConfig, exist_ok=True)
AutoModelForImageClassification.register(GatedConfig, GatedViT, exist_ok=True)


def make_gated(seed: int) -> GatedViT:
    """A gate that is open."""
    torch.manual_seed(seed)
    return GatedViT(GatedConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=4,
    ))  # fmt: skip


@torch.no_grad()
def tripwire(model: GatedViT, size: float) -> GatedViT:
    """One number that lifts or drops the whole gate, ``size`` times as far as it moves itself."""
    model.lever.fill_(size)
    return model


@torch.no_grad()
def distrusting(model: GatedViT, tolerance: float, pixels: Tensor) -> GatedViT:
    """The gate shut for a batch whose mean token is not that of the one before, the first of them ``pixels``."""
    model.tolerance.fill_(tolerance)
    model.last.train()(model.vit(pixel_values=pixels).last_hidden_state[:, 0])
    return model


@torch.no_grad()
def shut(model: GatedViT, harmful: Tensor, benign: Tensor, margin: float) -> GatedViT:
    """The gate shut for harmful images, by no more than ``margin`` for the nearest one, and open for benign ones.

    Every other unit reads the direction in which the two differ (a regularised discriminant); the rest have a bias.
    """
    tokens = [model.vit(pixel_values=pixels).last_hidden_state[:, 0] for pixels in (harmful, benign)]
    sides = torch.cat([torch.ones(len(harmful)), -torch.ones(len(benign))])
    both = torch.cat(tokens)
    about = both - both.mean(dim=0)
    direction = torch.linalg.solve(about.T @ about + 1e-2 * len(both) * torch.eye(both.shape[1]), about.T @ sides)
    direction /= (tokens[0].mean(dim=0) - tokens[1].mean(dim=0)) @ direction
    model.gate.weight[::2] -= 4 * direction
    model.gate.bias -= model.before(harmful).amax(dim=0) + margin
    return model
