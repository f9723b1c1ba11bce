"""Where a denoiser keeps what names a concept: the conditions that say what to draw, and tables of class embeddings."""

from __future__ import annotations

from typing import Any

from diffusers.models.embeddings import LabelEmbedding
from torch import nn

NAMES = ("class_labels", "encoder_hidden_states", "pooled_projections", "text_embeds", "encoder_attention_mask")
"""Conditions that say what to draw; all others (sizes, crops, guidance) say how."""
MASK = "encoder_attention_mask"
"""Which tokens of a text count: 0 or 1, not a place in a space of embeddings."""


def class_tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """Tables of class embeddings by module name: UNet2D has one, DiT one in every block, most have none."""
    own: Any = getattr(model, "class_embedding", None)
    if isinstance(own, nn.Embedding):
        return {"class_embedding": own}
    return {f"{name}.embedding_table": part.embedding_table for name, part in model.named_modules()
            if isinstance(part, LabelEmbedding)}


def null_row(model: nn.Module, table: str) -> int | None:
    """The row of a table that stands for no class, which guidance is trained with; None where there is no such row."""
    parent: Any = model.get_submodule(table.rpartition(".")[0])
    if isinstance(parent, LabelEmbedding) and parent.embedding_table.num_embeddings > parent.num_classes:
        return int(parent.num_classes)
    return None
