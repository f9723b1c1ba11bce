"""How like two sets of images are, by features of a model that the caller names: CLIP, DINO, or a small classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from hf_immunize.data import PixelMaker, convert_image, model_channels
from hf_immunize.errors import ModelError
from hf_immunize.features import extract_features, find_classifier
from hf_immunize.models import load_classifier, load_processor, refuse_non_finite

_ROWS = 50


class Similarity(Protocol):
    """M of a similarity gap ratio: anything with a name that maps two lists of images to a number, more for more alike.

    ``1 − LPIPS`` is one, for those who have it; ``FeatureSimilarity`` is what comes with the package.
    """

    @property
    def name(self) -> str:
        """What certificates call it."""

    def __call__(self, real: Sequence[Image.Image], drawn: Sequence[Image.Image]) -> float:
        """Mean similarity of all pairs."""


@dataclass(frozen=True)
class ImageFeatures:
    """One feature vector per image, from a model of transformers."""

    name: str
    model: nn.Module
    processor: Any
    head: str | None
    """Module whose input is the feature; None: the model's own image embedding."""

    @classmethod
    def of(cls, path: str | Path, device: str = "cpu") -> ImageFeatures:
        """Features of a folder or Hub id, from safetensors only.

        - an image classifier: the input of its head;
        - CLIP, SigLIP and relatives: the projected image embedding;
        - any other image model (DINOv2, …): its pooled output, else the first token of its last layer.

        Raises:
            ModelError: no such model, or none that takes images.
        """
        path, short = str(path), Path(path).name
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            classifies = any("ImageClassification" in name for name in config.architectures or [])
            model = load_classifier(path) if classifies else AutoModel.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"expected an image model saved with save_pretrained in {path}, got {error}: check the path."
            ) from error
        refuse_non_finite(model, path)
        kind = "classifier" if classifies else config.model_type
        head = find_classifier(model) if classifies else None
        return cls(f"{short} ({kind})", model.to(device).eval(), load_processor(path), head)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """N×D features on the CPU."""
        if self.head is not None:
            return extract_features(self.model, self._batches(images), [self.head])[self.head].float()
        device = next(self.model.parameters()).device
        return torch.cat([self._embed(b["pixel_values"].to(device)).cpu() for b in self._batches(images)]).float()

    def _batches(self, images: Sequence[Image.Image]) -> Iterator[dict[str, Tensor]]:
        make = PixelMaker(self.processor, model_channels(self.model), f"images for {self.name}")
        for start in range(0, len(images), _ROWS):
            yield {"pixel_values": make([convert_image(image, make.mode) for image in images[start : start + _ROWS]])}

    def _embed(self, pixel_values: Tensor) -> Tensor:
        model: Any = self.model
        if hasattr(model, "get_image_features"):
            found = model.get_image_features(pixel_values=pixel_values)
            return found if isinstance(found, Tensor) else found.pooler_output
        output = model(pixel_values=pixel_values)
        pooled = getattr(output, "pooler_output", None)
        return (output.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1)


@dataclass(frozen=True)
class FeatureSimilarity:
    """Mean cosine of all pairs of a real and a drawn image (CLIP-I and DINO scores; Ruiz et al. 2023, section 4)."""

    features: ImageFeatures

    @property
    def name(self) -> str:
        """What certificates call it."""
        return f"cosine similarity of features of {self.features.name}"

    def __call__(self, real: Sequence[Image.Image], drawn: Sequence[Image.Image]) -> float:
        """M in −1..1."""
        one, other = (nn.functional.normalize(self.features(images).double()) for images in (real, drawn))
        return float((one @ other.mT).mean())
