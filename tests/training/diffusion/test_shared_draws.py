"""Ranks draw what one process would have drawn, in training alone, and the model gets its own parts back."""

from __future__ import annotations

import copy

import pytest
import torch
from denoiser_builders import build_denoiser
from diffusers.models.embeddings import LabelEmbedding
from hypothesis import given
from hypothesis import strategies as st

from hf_immunize.training.core.draws import same_draws
from hf_immunize.training.diffusion import draws

CPU = torch.device("cpu")


def answers(module, rows, ranks, monkeypatch):
    """What ``ranks`` processes answer on their shares of ``rows``, put back in order."""
    found = torch.empty(len(rows), *module(rows[:1]).shape[1:])
    for rank in range(ranks):
        monkeypatch.setattr(draws, "world", lambda rank=rank: (rank, ranks))
        with same_draws(CPU, "seed", 3):
            found[rank::ranks] = module(rows[rank::ranks])
    return found


@given(share=st.integers(1, 4), ranks=st.integers(1, 4), p=st.sampled_from([0.2, 0.7]))
def test_dropout_and_dropped_labels_do_not_depend_on_the_number_of_processes(share, ranks, p):
    dropout, labels = torch.nn.Sequential(torch.nn.Dropout(p)), torch.nn.Sequential(LabelEmbedding(7, 3, p))
    for module, rows in ((dropout, torch.ones(share * ranks, 5, 4)), (labels, torch.arange(share * ranks) % 7)):
        draws.share_draws(module)
        with pytest.MonkeyPatch.context() as patch:
            assert torch.equal(answers(module, rows, ranks, patch), answers(module, rows, 1, patch))


def test_shares_that_are_dropped_and_their_scale_are_those_of_the_plain_parts():
    plain = torch.nn.Sequential(torch.nn.Dropout(0.3), LabelEmbedding(7, 3, 0.4), torch.nn.Dropout(1.0))
    shared = copy.deepcopy(plain)
    draws.share_draws(shared)
    torch.manual_seed(0)
    kept = shared[0](torch.ones(200, 100))
    assert float((kept == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.equal(kept.unique(), torch.tensor([0, 1 / 0.7])) and not shared[2](torch.ones(4)).any()
    dropped = shared[1].token_drop(torch.zeros(2000, dtype=torch.long))
    assert float((dropped == 7).float().mean()) == pytest.approx(0.4, abs=0.05) and set(dropped.tolist()) == {0, 7}
    forced = torch.tensor([1, 0])
    assert shared[1].token_drop(torch.tensor([2, 2]), forced).tolist() == [7, 2]
    shared.eval(), plain.eval()
    rows = torch.randn(4, 5)
    assert torch.equal(shared[0](rows), rows)
    assert torch.equal(shared[1](torch.tensor([3])), plain[1](torch.tensor([3])))


def test_copies_follow_and_every_part_gets_its_own_class_back(make_trainer):
    model = build_denoiser("dit")
    kinds = [type(module) for module in model.modules()]
    trainer = make_trainer("dit", model=model, objective="simulated_attack", attacker_steps=1, max_steps=1)
    (attack,) = trainer.terms.weight_terms.objectives.values()
    assert isinstance(attack._attacker.model.transformer_blocks[0].norm1.emb.class_embedder,
                      draws._SharedLabelEmbedding)
    trainer.train()
    assert [type(module) for module in trainer.bare.modules()] == kinds
