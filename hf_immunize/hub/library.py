"""What a published folder is to the libraries that load it: a model, an adapter on a base, or a pipeline."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from hf_immunize.records import Certificate

ADAPTER_FILE, PIPELINE_FILE = "adapter_config.json", "model_index.json"
LOADERS = {
    "image-classification": "AutoModelForImageClassification",
    "image-feature-extraction": "AutoModel",
    "text-to-image": "DiffusionPipeline",
    "image-to-image": "DiffusionPipeline",
    "unconditional-image-generation": "DiffusionPipeline",
}
"""Class of the loading snippet, by pipeline tag."""


@dataclass(frozen=True)
class Library:
    """The Hub's words for one kind of model."""

    name: Literal["transformers", "peft", "diffusers"]
    relation: Literal["finetune", "adapter"]
    """How it stands to its base."""
    tag: str
    """The pipeline tag where none was given."""


def library_of(certificate: Certificate, names: Container[str]) -> Library:
    """What the certified files make of a folder; its own ``names`` decide where the certificate covers none."""

    def holds(name: str) -> bool:
        return name in (certificate.files or names)

    if holds(PIPELINE_FILE):
        reads_text = any(name.startswith("text_encoder/") for name in certificate.subject.weights)
        return Library("diffusers", "finetune", "text-to-image" if reads_text else "unconditional-image-generation")
    classifies = certificate.subject.architecture.endswith("ForImageClassification")
    tag = "image-classification" if classifies else "image-feature-extraction"
    return Library("peft", "adapter", tag) if holds(ADAPTER_FILE) else Library("transformers", "finetune", tag)
