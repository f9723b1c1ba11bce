"""The part of imma's attacker that lies before its classifier: LoRA on attention, trained as the model changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.features import linear_sites
from hf_immunize.linalg import to_double
from hf_immunize.training.core.distributed import RowExchange, sum_over_ranks
from hf_immunize.training.core.terms import Rows

_SCALE = 2.0
"""alpha / rank, as in the LoRA attack of the exam."""


class LoraAttacker:
    """W ← W + 2·B·A at query and value projections (where there are none, at every linear layer but the head).

    IMMA (Zheng & Yeh 2024) with LoRA: before each step of the defender the factors take one AdamW step down the
    attacker's own training loss, the model held; the defender then raises the loss the attacker reaches on other rows,
    the factors held. A starts uniform in ±1/√D and B at zero, as in PEFT, and both are kept from step to step.

    Raises:
        ModelError: a model without such layers.
    """

    def __init__(self, model: nn.Module, head: str, *, rank: int, rate: float, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name in linear_sites(model, "lora", head):
            weight = model.get_parameter(f"{name}.weight")
            width = weight.shape[1]
            down = (2 * torch.rand(rank, width, generator=generator, dtype=torch.float64) - 1) / width**0.5
            up = torch.zeros(weight.shape[0], rank)
            self.factors[name] = (_leaf(down, weight), _leaf(up, weight))
        self._flat = [factor for pair in self.factors.values() for factor in pair]
        self._optimizer = torch.optim.AdamW(self._flat, lr=rate, weight_decay=0.0)
        self._exchange = RowExchange()

    @contextmanager
    def attached(self, model: nn.Module, *, learning: bool = False) -> Iterator[None]:
        """Inside, forwards of ``model`` have the updates; with ``learning``, gradients reach the factors."""

        def hook(pair: tuple[Tensor, Tensor]) -> Callable[..., Tensor]:
            down, up = pair if learning else (pair[0].detach(), pair[1].detach())

            def add(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                return output + (_SCALE * (args[0] @ down.T.to(args[0])) @ up.T.to(args[0])).to(output)

            return add

        handles = [model.get_submodule(n).register_forward_hook(hook(pair)) for n, pair in self.factors.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def learn(
        self, forwards: Sequence[Callable[[], tuple[Tensor, Tensor]]], loss_of: Callable[[Rows], Tensor]
    ) -> Tensor:
        """One step down ``loss_of`` the rows of all ranks and micro-batches; returns the loss before it.

        With several micro-batches each is run twice: without gradient for the loss of all of them, then for its own
        share of the gradient.

        Args:
            forwards: one per micro-batch; features (with a graph to the factors) and labels of this rank's rows.
        """
        first = forwards[0]() if len(forwards) == 1 else None
        with torch.no_grad():
            parts = [first] if first is not None else [forward() for forward in forwards]
        found = self._exchange([tensor for pair in parts for tensor in pair])
        gathered = list(zip(found[::2], [labels for labels, _ in found[1::2]], strict=True))
        leaf = to_double(torch.cat([rows for (rows, _), _ in gathered])).requires_grad_()
        with torch.enable_grad():
            labels = torch.cat([found for _, found in gathered])
            loss = loss_of(Rows(leaf, labels, parts[0][0].dtype))
            (gradient,) = torch.autograd.grad(loss, leaf)
        self._optimizer.zero_grad()
        start = 0
        for forward, ((rows, mine), _) in zip(forwards, gathered, strict=True):
            with torch.enable_grad():
                features = first[0] if first is not None else forward()[0]
                share = (features * gradient[start + mine].to(features)).sum()
            self._add(torch.autograd.grad(share, self._flat, allow_unused=True))
            start += len(rows)
        sum_over_ranks([factor.grad for factor in self._flat if factor.grad is not None])
        self._optimizer.step()
        return loss.detach()

    def _add(self, gradients: Sequence[Tensor | None]) -> None:
        """Sum this micro-batch's gradients on this rank into the factors'."""
        for factor, gradient in zip(self._flat, gradients, strict=True):
            whole = torch.zeros_like(factor) if gradient is None else gradient.contiguous()
            factor.grad = whole if factor.grad is None else factor.grad + whole

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors."""
        kept = {f"factor|{place}": factor.detach() for place, factor in enumerate(self._flat)}
        for place, factor in enumerate(self._flat):
            kept |= {f"adam|{place}|{name}": value for name, value in self._optimizer.state[factor].items()}
        return kept

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        for place, factor in enumerate(self._flat):
            factor.copy_(state[f"factor|{place}"])
            start = f"adam|{place}|"
            kept = {n.removeprefix(start): v for n, v in state.items() if n.startswith(start)}
            self._optimizer.state[factor] = {n: v if n == "step" else v.to(factor) for n, v in kept.items()}


def _leaf(values: Tensor, like: Tensor) -> Tensor:
    return values.to(device=like.device, dtype=like.dtype).requires_grad_()
