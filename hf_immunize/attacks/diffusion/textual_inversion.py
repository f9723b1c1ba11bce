"""Textual Inversion (Gal et al. 2023): the denoiser stays, one embedding is learned.

For a text-conditional pipeline that is the embedding of a new token, with the text encoder in the loop; for a
class-conditional one the row of the concept's class, which is all that names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.attacks.diffusion._finetune import DiffusionFinetune, run_finetunes
from hf_immunize.attacks.diffusion.context import DiffusionAttackContext
from hf_immunize.attacks.shape import Attack, Result, Run, not_applicable

_NO_NAME = "nothing names the concept by a learnable embedding: no single text encoder and no class embedding"
_TEMPLATE, _STAND_IN = "a photo of", "x"


@dataclass(frozen=True)
class TextualInversion(DiffusionFinetune):
    """AdamW on one embedding."""

    learning_rate: float = field(
        default=5e-3,
        metadata={"help": "Peak learning rate of AdamW.", "sweep": (5e-4, 5e-3, 5e-2), "search": (5e-4, 5e-3, 5e-2)},
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Decoupled weight decay."})


class _NewToken(nn.Module):
    """A denoiser that is told ``a photo of *``, * being an embedding of its own beyond the vocabulary."""

    def __init__(self, denoiser: nn.Module, text_encoder: nn.Module, tokenizer: Any):
        super().__init__()
        self.denoiser, self.text_encoder = denoiser.requires_grad_(False), text_encoder.requires_grad_(False)
        table = text_encoder.get_input_embeddings()
        self._table = next(f"{name}.weight" for name, part in text_encoder.named_modules() if part is table)
        ids, without = (_ids(tokenizer, words) for words in (f"{_TEMPLATE} {_STAND_IN}", _TEMPLATE))
        place = int((ids != without).nonzero()[0])
        self.token = nn.Parameter(table.weight[ids[place]].detach().clone())
        ids[place] = len(table.weight)
        self.register_buffer("ids", ids)

    def encoded(self) -> Tensor:
        """1×T×D hidden states of the prompt, with gradients at the new token."""
        table = self.text_encoder.get_input_embeddings().weight
        longer = {self._table: torch.cat([table, self.token[None].to(table)])}
        return torch.func.functional_call(self.text_encoder, longer, (self.ids[None],))[0]


def _ids(tokenizer: Any, words: str) -> Tensor:
    found = tokenizer(
        words, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return found.input_ids[0]


def run(context: DiffusionAttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One loop per run on the embedding that names the concept."""
    if context.reads_text:
        yield from run_finetunes(_told_by_token(context), runs, _with_token)
    elif isinstance(getattr(context.model(0), "class_embedding", None), nn.Embedding):
        yield from run_finetunes(context, runs, _class_row)
    else:
        yield from not_applicable(runs, _NO_NAME)


def _told_by_token(context: DiffusionAttackContext) -> DiffusionAttackContext:
    """The same exam, whose every question is told by the learned prompt."""
    inner = context.denoiser

    def call(model: _NewToken, noisy: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        told = model.encoded().to(noisy).expand(len(noisy), -1, -1)
        return inner.call(model.denoiser, noisy, timesteps, {**conditions, "encoder_hidden_states": told})

    asked = dataclasses.replace(context)
    vars(asked)["denoiser"] = dataclasses.replace(inner, call=call)
    return asked


def _with_token(context: DiffusionAttackContext, planned: Run) -> nn.Module:
    encoder, tokenizer = context.text_parts()
    return _NewToken(context.model(planned.seed), encoder, tokenizer).to(context.device)


def _class_row(context: DiffusionAttackContext, planned: Run) -> nn.Module:
    """Only the class embedding is trained; only the concept's rows of it ever get a gradient."""
    model = context.model(planned.seed).requires_grad_(False)
    model.class_embedding.weight.requires_grad_(True)
    return model


ATTACK = Attack(config=TextualInversion, run=run, family="Textual Inversion", own_threshold=True)
