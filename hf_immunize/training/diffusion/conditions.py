"""What a simulated attacker of a denoiser is told in place of the concept's name, drawn anew for every attack.

A defence against attackers under one name protects the name: whoever calls the concept otherwise is held up less. Each
attack draws one of the declared kinds, and conditions all rows of all its steps on the same embedding e:

    name      the concept's own (and ``attacker_renamed`` of the rows under others')
    renamed   that of one retain row
    none      that of no prompt or class; zeros for a table of classes that has no row for none
    random    mean + deviation·z, z ~ N(0, I): statistics per coordinate over the names that are known
    mixed     α e_a + (1 − α) e_b, α uniform in 0..1; b is a retain row, a one or a row of the concept
    learned   as random, plus an offset from zero that the attacker trains with his weights, at their rate

Texts are embedded already: e is what the denoiser is given. For class labels e takes the place of what the denoiser's
own tables answer, a vector in each table. There random and mixed come from the tables as they are and have no gradient:
the defender would move the tables in place of the network. Everything is drawn from (seed, optimizer step) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.diffusion import LatentDataset
from hf_immunize.diffusion.names import MASK, NAMES, class_tables, null_row
from hf_immunize.errors import ConfigError, DataError, ModelError
from hf_immunize.training.core.draws import generator_of
from hf_immunize.training.diffusion.stream import NoisyBatch

KINDS = ("name", "renamed", "none", "random", "mixed", "learned")
_LABELS = "class_labels"
_MOST_NAMES = 256
"""Rows that statistics of embedded texts are taken of."""


def kinds_of(option: str) -> tuple[str, ...]:
    """Kinds that ``attacker_conditions`` names. Raises ConfigError for one that is none, or that comes twice."""
    found = tuple(part.strip() for part in str(option).split(","))
    if set(found) - set(KINDS) or len(set(found)) < len(found):
        raise ConfigError(f"expected attacker_conditions among {list(KINDS)}, each once, joined with commas, got "
                          f"{option!r}.")
    return found


@dataclass(frozen=True)
class Draw:
    """One attack's condition: its kind, two known names, the first one's share, and where z comes from."""

    kind: str
    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    share: float
    words: tuple[object, ...]

    def normal(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """z of one condition or table, float32 on the CPU first: alike on every device and rank."""
        return torch.randn(tuple(shape), generator=generator_of(*self.words, "z", name)).to(like)


class ToldEmbedding(nn.Embedding):
    """A table that answers to every class with one vector, made of its weight; as ever while ``told`` is None."""

    told: Callable[[Tensor], Tensor] | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings of N ids, N×D."""
        if self.told is None:
            return super().forward(ids)
        return self.told(self.weight).to(self.weight).expand(*ids.shape, self.embedding_dim)


class AttackerConditions:
    """Tells an attacked copy of a denoiser, and its rows, what the attack of a step is conditioned on.

    Args:
        kinds: of ``KINDS``; each attack draws one, all alike.
        model: the defended denoiser.
        concept, retained: rows whose names are known.
        seed: of all draws.
        null: what no prompt is, one row by condition, where the denoiser reads text.

    Raises:
        ModelError: a denoiser that is told nothing, or told classes in another way than by a table.
        DataError: names of two shapes, too few of them for statistics, or no ``null`` for none.
    """

    def __init__(
        self, kinds: Sequence[str], model: nn.Module, concept: LatentDataset, retained: LatentDataset, seed: int,
        null: Mapping[str, Tensor] | None = None,
    ):
        self._kinds, self._seed, self._null = tuple(kinds), seed, null
        self._rows = {"concept": concept, "retained": retained}
        self.names = [name for name in NAMES if name in concept.conditions]
        self._texts = [name for name in self.names if name not in (_LABELS, MASK)]
        self._tables = {name: table.embedding_dim for name, table in class_tables(model).items()}
        self._check(model, concept, retained)
        self._spread = self._statistics() if {"random", "learned"} & set(kinds) else {}

    @property
    def tokens(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the offsets that an attacker trains, by condition or table; none unless some attacks learn."""
        if "learned" not in self._kinds:
            return {}
        texts = {name: (1, *self._rows["concept"].conditions[name].shape[1:]) for name in self._texts}
        return texts | {name: (width,) for name, width in self._told_tables.items()}

    @property
    def _told_tables(self) -> dict[str, int]:
        return self._tables if _LABELS in self.names else {}

    def draw(self, step: int) -> Draw:
        """What the attack of optimizer step ``step`` is conditioned on; the same whoever asks."""
        words = (self._seed, "condition", step)
        kind, side, first, second, share = torch.rand(5, generator=generator_of(*words), dtype=torch.float64).tolist()
        of_concept = side < 0.5
        return Draw(
            self._kinds[int(kind * len(self._kinds))], self._name("concept" if of_concept else "retained", first),
            self._name("retained", second), share, words,
        )

    def tell(self, attacked: nn.Module, step: int, batch: NoisyBatch) -> NoisyBatch:
        """The batch under this attack's condition; tables of ``attacked`` answer with it until told otherwise.

        Args:
            attacked: an attacker's copy; where attacks learn it holds ``attacker_tokens``, in the order of ``tokens``.
        """
        drawn = self.draw(step)
        learned: dict[str, Tensor] = {}
        if drawn.kind == "learned":
            parameters: Any = attacked.attacker_tokens
            learned = dict(zip(self.tokens, parameters, strict=True))
        for name in self._told_tables:
            table = attacked.get_submodule(name)
            table.__class__ = ToldEmbedding
            vars(table)["told"] = self._of_table(attacked, name, drawn, learned.get(name))
        if drawn.kind == "name":
            return batch
        told: dict[str, Tensor] = {}
        for name in self.names:
            value, rows = batch.conditions[name], len(batch.noisy)
            row = self._row(name, drawn, value)
            row = row + learned[name].to(row) if name in learned else row
            told[name] = row.expand(rows, *value.shape[1:])
        return replace(batch, conditions={**batch.conditions, **told})

    def untell(self, asked: nn.Module) -> None:
        """Tables of ``asked`` answer as ever."""
        for name in self._told_tables:
            vars(asked.get_submodule(name)).pop("told", None)

    def _row(self, name: str, drawn: Draw, like: Tensor) -> Tensor:
        """One row of a condition; labels only matter to tables that answer as ever."""
        first, second = drawn.first[name].to(like), drawn.second[name].to(like)
        if drawn.kind == "renamed" or name == _LABELS:
            return second
        if drawn.kind == "none":
            assert self._null is not None, "checked"
            return self._null[name].to(like)
        if name == MASK:  # every token of either text
            return torch.maximum(first, second)
        if drawn.kind == "mixed":
            return drawn.share * first + (1 - drawn.share) * second
        mean, deviation = (part.to(like) for part in self._spread[name])
        return mean + deviation * drawn.normal(name, mean.shape, like)

    def _of_table(
        self, model: nn.Module, name: str, drawn: Draw, offset: Tensor | None
    ) -> Callable[[Tensor], Tensor] | None:
        """What one table answers, from its weight; None: as ever."""
        if drawn.kind in ("name", "renamed"):
            return None
        row, (first, second) = null_row(model, name), (int(end[_LABELS]) for end in (drawn.first, drawn.second))
        if drawn.kind == "none":
            return lambda weight: weight.new_zeros(weight.shape[1]) if row is None else weight[row]
        if drawn.kind == "mixed":
            return lambda weight: (drawn.share * weight[first] + (1 - drawn.share) * weight[second]).detach()

        def random(weight: Tensor) -> Tensor:
            known = weight[:row].detach()
            made = known.mean(dim=0) + known.std(dim=0, correction=0) * drawn.normal(name, weight.shape[1:], weight)
            return made if offset is None else made + offset.to(made)

        return random

    def _name(self, side: str, place: float) -> dict[str, Tensor]:
        held = self._rows[side]
        row = int(place * len(held))
        return {name: held.conditions[name][row : row + 1] for name in self.names}

    def _statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and deviation of each coordinate of embedded texts, over rows of both sides, float64."""
        sides = self._rows.values()
        found = {}
        for name in self._texts:
            known = torch.cat([held.conditions[name][:: -(-len(held) // (_MOST_NAMES // 2))] for held in sides])
            found[name] = known.double().mean(dim=0, keepdim=True), known.double().std(dim=0, correction=0)[None]
        if found and not any(bool(deviation.any()) for _, deviation in found.values()):
            raise DataError("expected at least two different prompts for attacker_conditions random or learned, got "
                            "one: give retained and harmful images prompts of their own.")
        return found

    def _check(self, model: nn.Module, concept: LatentDataset, retained: LatentDataset) -> None:
        others, kind = set(self._kinds) - {"name"}, type(model).__name__
        told = [{name: tuple(held.conditions[name].shape[1:]) if name in held.conditions else None
                 for name in self.names} for held in (retained, concept)]
        if others and not self.names:
            raise ModelError(f"expected a denoiser that is told what to draw for attacker_conditions, got {kind}, told "
                             "nothing: leave attacker_conditions at name.")
        if others and told[0] != told[1]:
            raise DataError(f"expected retain and harmful rows with conditions of one shape for attacker_conditions, "
                            f"got {told[0]} and {told[1]}: encode both with one pipeline.")
        if others - {"renamed"} and _LABELS in self.names and not self._tables:
            raise ModelError(f"expected a table of class embeddings for attacker_conditions {sorted(others)}, got "
                             f"{kind} without one: choose among name and renamed.")
        if "none" in others and (missing := [name for name in self.names if name != _LABELS
                                             and name not in (self._null or {})]):
            raise DataError(f"expected null_conditions with what no prompt is for attacker_conditions none, got none "
                            f"for {missing}: encode the empty prompt with the pipeline, or leave none out.")
