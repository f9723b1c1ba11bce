"""Simulated attackers who are told something else than the concept's name: what they are told, and that it is drawn."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter

import pytest
import torch
from denoiser_builders import build_denoiser, build_examples, build_scheduler
from diffusers.models.embeddings import LabelEmbedding
from torch import nn

from hf_immunize.diffusion import LatentDataset, NoiseProcess, denoiser_of
from hf_immunize.errors import ConfigError, DataError, ModelError
from hf_immunize.training.core.draws import generator_of
from hf_immunize.training.core.habits import Habits
from hf_immunize.training.core.simulated import SimulatedAttack
from hf_immunize.training.core.unrolled import UnrolledAttack
from hf_immunize.training.diffusion.conditions import KINDS, AttackerConditions, kinds_of
from hf_immunize.training.diffusion.setup import denoising_task
from hf_immunize.training.diffusion.stream import NoisyStream

CPU, F64 = torch.device("cpu"), torch.float64
NULL = {"encoder_hidden_states": 7 * torch.ones(1, 5, 12), "pooled_projections": 5 * torch.ones(1, 10),
        "text_embeds": 5 * torch.ones(1, 10)}  # fmt: skip
OTHERS = KINDS[1:]


def rows_of(family):
    retained = build_examples(family, 16, dtype=F64)
    return build_examples(family, 12, seed=1, label=9, dtype=F64), retained


def conditions_of(family, model, *kinds, seed=0):
    return AttackerConditions(kinds, model, *rows_of(family), seed, NULL)


def with_tokens(model, shapes, value=0.0):
    made = copy.deepcopy(model)
    made.attacker_tokens = nn.ParameterList([nn.Parameter(torch.full(shape, value, dtype=F64))
                                             for shape in shapes.values()])  # fmt: skip
    return made


def noised(family, step=0):
    process = NoiseProcess.from_scheduler(build_scheduler(family))
    return NoisyStream(rows_of(family)[0], process, 6, seed=0, name="attack").batch(step, CPU, F64)


def answer(family, model, batch):
    return denoiser_of(model).call(model, batch.noisy, batch.timesteps, batch.conditions)


def normal(step, name, shape, seed=0):
    return torch.randn(shape, generator=generator_of(seed, "condition", step, "z", name)).double()


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("family", ["unet", "sd", "sdxl", "dit", "pixart", "sd3", "flux"])
def test_each_kind_changes_the_answer_as_one_condition_for_all_rows_and_sizes_stay(family, kind):
    model = build_denoiser(family, dtype=F64).eval()
    told = conditions_of(family, model, kind)
    attacked, own = with_tokens(model, told.tokens), noised(family)
    batch = told.tell(attacked, 3, own)
    plain, other = answer(family, model, own), answer(family, attacked, batch)
    assert bool((plain - other).flatten(1).abs().amax(dim=1).min() > 1e-9)
    names = {"encoder_hidden_states", "pooled_projections", "text_embeds", "class_labels"} & batch.conditions.keys()
    for name, value in batch.conditions.items():
        if name in names:
            assert torch.equal(value, value[:1].expand_as(value)) and value.shape == own.conditions[name].shape
        else:
            assert torch.equal(value, own.conditions[name])
    assert all(torch.equal(getattr(batch, part), getattr(own, part)) for part in ("noisy", "target", "labels"))
    again = told.tell(attacked, 3, own)  # and as it was once the attack is of another kind
    assert torch.equal(answer(family, attacked, again), other)
    told._kinds = ("name",)
    assert torch.equal(answer(family, attacked, told.tell(attacked, 4, own)), plain)


def test_a_text_is_told_what_the_formulas_say():
    model = build_denoiser("sd", dtype=F64)
    concept, retained = rows_of("sd")
    name = "encoder_hidden_states"
    texts, others = concept.conditions[name], retained.conditions[name]
    known = torch.cat([texts, others])
    mean = known.mean(dim=0)
    deviation = ((known - mean).square().sum(dim=0) / len(known)).sqrt()
    seen = set()
    ends = (known[:, None], others[None])
    for kind in OTHERS:
        told = conditions_of("sd", model, kind)
        attacked, rows = with_tokens(model, told.tokens, value=0.25), noised("sd")
        for step in range(12):
            found = told.tell(attacked, step, rows).conditions[name][0]
            if kind == "none":
                assert torch.equal(found, NULL[name][0].double())
            elif kind == "renamed":
                assert any(torch.equal(found, row) for row in others)
            elif kind == "mixed":
                a, b = ends
                away = (found - b - told.draw(step).share * (a - b)).abs().amax(dim=(-2, -1))
                seen.add(int(away.argmin()) // len(others) < len(texts))
                assert float(away.min()) < 1e-12
            else:
                truth = mean + deviation * normal(step, name, (1, 5, 12))[0]
                assert torch.allclose(found, truth + (0.25 if kind == "learned" else 0), atol=1e-12)
    assert seen == {True, False}  # one end is the concept's own name in some attacks, not in others


def test_a_mixed_text_has_the_tokens_of_both():
    mask = "encoder_attention_mask"
    concept, retained = rows_of("pixart")
    for rows, seen in ((concept, (1, 1, 0, 0, 0)), (retained, (1, 0, 1, 1, 0))):
        rows.conditions[mask] = torch.tensor(seen).expand(len(rows), 5)
    told = AttackerConditions(("mixed", "renamed"), build_denoiser("pixart", dtype=F64), concept, retained, 0)
    batch = noised("pixart")
    batch = dataclasses.replace(batch, conditions={**batch.conditions, mask: concept.conditions[mask][:6]})
    found = {(told.draw(step).kind, tuple(told.tell(told, step, batch).conditions[mask][0].tolist()))
             for step in range(60)}  # fmt: skip
    assert found == {("renamed", (1, 0, 1, 1, 0)), ("mixed", (1, 0, 1, 1, 0)), ("mixed", (1, 1, 1, 1, 0))}


@pytest.mark.parametrize("family", ["unet", "dit"])
def test_a_table_answers_what_the_formulas_say(family):
    model = build_denoiser(family, dtype=F64).eval()
    parts = {"class_embedding": model.class_embedding} if family == "unet" else {
        f"{name}.embedding_table": part.embedding_table for name, part in model.named_modules()
        if isinstance(part, LabelEmbedding)
    }  # fmt: skip
    assert len(parts) == (1 if family == "unet" else 2)
    for kind in ("none", "random", "mixed", "learned"):
        told = conditions_of(family, model, kind)
        attacked = with_tokens(model, told.tokens, value=0.25)
        told.tell(attacked, 5, noised(family))
        for name, part in parts.items():
            found = attacked.get_submodule(name)(torch.tensor([9, 1]))
            weight = part.weight.detach()
            assert torch.equal(found[0], found[1])
            if kind == "none":
                assert torch.equal(found[0], weight[10] if family == "dit" else torch.zeros_like(weight[0]))
            elif kind == "mixed":
                draw = told.draw(5)
                first, second = (weight[int(end["class_labels"])] for end in (draw.first, draw.second))
                assert torch.allclose(found[0], draw.share * first + (1 - draw.share) * second)
                assert 0 < draw.share < 1
            else:
                known = weight[:10]
                truth = known.mean(0) + known.std(0, correction=0) * normal(5, name, weight.shape[1:])
                assert torch.allclose(found[0], truth + (0.25 if kind == "learned" else 0))
            assert found.requires_grad == (kind == "learned" or (kind == "none" and family == "dit"))


def test_kinds_and_names_are_drawn_evenly_from_seed_and_step_alone():
    model = build_denoiser("unet", dtype=F64)
    told = conditions_of("unet", model, *KINDS)
    drawn = [told.draw(step) for step in range(600)]
    counts = Counter(found.kind for found in drawn)
    assert set(counts) == set(KINDS) and min(counts.values()) > 60
    torch.manual_seed(5)
    again = conditions_of("unet", model, *KINDS)
    assert [again.draw(step) for step in reversed(range(600))] == drawn[::-1]
    assert [conditions_of("unet", model, *KINDS, seed=1).draw(step).kind for step in range(600)] != [
        found.kind for found in drawn]
    assert {int(found.second["class_labels"]) for found in drawn} == set(range(8))
    assert set(kinds_of(" none, random ,learned")) == {"none", "random", "learned"}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("family", ["unet", "sd"])
def test_a_step_is_the_same_however_it_is_cut(family, kind, make_trainer):
    found = {}
    for parts in (1, 2, 4):
        trainer = make_trainer(
            family, model=build_denoiser(family, dtype=F64), dtype=F64, objective="simulated_attack", attacker_steps=1,
            attacker_conditions=kind, null_conditions=NULL,
            gradient_accumulation_steps=parts, per_device_harmful_batch_size=8 // parts,
            per_device_train_batch_size=8 // parts,
        )
        (term,) = trainer.terms.weight_terms.objectives.values()
        term.ceiling = 10.0
        found[parts] = term.gradient(trainer.bare, 2)
    for parts in (2, 4):
        assert float(found[parts][0]) == pytest.approx(float(found[1][0]), rel=1e-12)
        for name, truth in found[1][1].items():
            assert torch.allclose(found[parts][1][name], truth, rtol=1e-9, atol=1e-13), name


@pytest.mark.parametrize("kind", ["none", "learned"])
def test_blocks_that_are_computed_again_are_told_the_same(kind, make_trainer):
    """Each block of DiT has its own table, and reads it a second time on the way back."""
    found = {}
    for again in (False, True):
        trainer = make_trainer("dit", model=build_denoiser("dit", dtype=F64), dtype=F64, objective="simulated_attack",
                               attacker_steps=2, attacker_conditions=kind, gradient_checkpointing=again)
        (term,) = trainer.terms.weight_terms.objectives.values()
        term.ceiling = 10.0
        found[again] = term.gradient(trainer.bare, 2)[1]
    assert all(torch.allclose(found[True][name], part, rtol=1e-9, atol=1e-14) for name, part in found[False].items())
    assert any(bool(part.any()) for part in found[True].values())


def attack_of(model, *kinds, kind=SimulatedAttack, steps=2, rank=0, rate=3e-2):
    told = conditions_of("unet", model, *kinds)
    batches = {k: noised("unet", k) for k in range(steps + 1)}
    task = denoising_task(denoiser_of(model), model, lambda step, k: batches[k], 0, conditions=told)
    made = kind(task, steps=steps, habits=Habits(rate), rank=rank)
    made.ceiling = 100.0
    return made, batches


@pytest.mark.parametrize("rank", [0, 2])
def test_an_attack_that_learns_its_token_is_the_attack_written_out(rank):
    model = build_denoiser("unet", dtype=F64).train()
    attack, batches = attack_of(model, "learned", rank=rank)
    attack.gradient(model, 4)  # an attack before it leaves nothing behind
    value, gradient = attack.gradient(model, 5)
    attack._start(model, 5)
    slow = copy.deepcopy(attack._attacker.model)
    del slow.attacker_tokens
    weight = model.class_embedding.weight.detach()
    start = weight.mean(0) + weight.std(0, correction=0) * normal(5, "class_embedding", weight.shape[1:])
    token = nn.Parameter(start.clone())
    slow.class_embedding = Answers(token)
    trained = [token, *(part for name, part in slow.named_parameters() if rank == 0 or "lora_" in name)]
    optimizer = torch.optim.AdamW(dict.fromkeys(trained), lr=3e-2, weight_decay=0.0)
    truth, total = 0.0, {name: torch.zeros_like(part) for name, part in slow.named_parameters()}
    for k in range(3):
        slow.zero_grad()
        batch = batches[k]
        labels = batch.conditions["class_labels"]
        loss = (slow(batch.noisy, batch.timesteps, class_labels=labels).sample - batch.target).square().mean()
        loss.backward()
        if k > 0:
            truth += (100.0 - float(loss.detach())) / 2
            for name, part in slow.named_parameters():
                total[name] -= 0 if part.grad is None else part.grad / 2
        optimizer.step()
    assert float((token - start).abs().min().detach()) > 1e-3 and float(value) == pytest.approx(truth, rel=1e-10)
    plain = {name.replace(".base_layer.", "."): part for name, part in total.items()}
    assert all(torch.allclose(part, plain[name], rtol=1e-7, atol=1e-12)
               for name, part in gradient.items() if not name.startswith("class_embedding"))
    assert not bool(gradient["class_embedding.weight"].any())


class Answers(nn.Module):
    """One vector, whatever is asked."""

    def __init__(self, vector):
        super().__init__()
        self.vector = vector

    def forward(self, ids):
        return self.vector.expand(len(ids), -1)


@pytest.mark.parametrize("kind", OTHERS)
def test_the_exact_gradient_holds_under_every_condition(kind):
    """By central differences of the weights but the table, whose vectors are held where they are random or mixed."""
    model = build_denoiser("unet", dtype=F64).train()
    attack, _ = attack_of(model, kind, kind=UnrolledAttack, rate=1e-3)
    attack.ceiling = 10.0
    _, gradient = attack.gradient(model, 5)
    generator, ends = torch.Generator().manual_seed(0), []
    direction = {name: torch.randn(part.shape, generator=generator, dtype=F64) for name, part in gradient.items()
                 if not name.startswith("class_embedding")}  # fmt: skip
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, part in moved.named_parameters():
                part += sign * 1e-6 * direction.get(name, 0)
        ends.append(float(attack.gradient(moved, 5)[0]))
    told = sum(float((gradient[name] * part).sum()) for name, part in direction.items())
    assert told == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("second", [False, True])
def test_a_run_under_all_conditions_resumes_exactly_and_leaves_an_ordinary_model(second, make_trainer, tmp_path):
    options = {"objective": "simulated_attack", "attacker_steps": 1, "attacker_conditions": ",".join(KINDS),
               "max_steps": 9, "save_steps": 4, "save_total_limit": 3, "attacker_second_order": second}  # fmt: skip
    whole = make_trainer("dit", **options)
    kinds = {conditions.kind for conditions in map(drawn_by(whole), range(9))}
    assert len(kinds) > 3
    types = [type(part) for part in build_denoiser("dit").modules()]
    whole.train()
    after = whole.bare.state_dict()
    assert [type(part) for part in whole.bare.modules()] == types
    assert after.keys() == build_denoiser("dit").state_dict().keys()
    resumed = make_trainer("dit", **options)
    resumed.train(tmp_path / "run" / "checkpoint-4")
    assert all(torch.equal(value, after[name]) for name, value in resumed.bare.state_dict().items())


def drawn_by(trainer):
    told = AttackerConditions(KINDS, trainer.bare, trainer._rows["harmful_dataset"], trainer._rows["train_dataset"],
                              trainer.args.seed)
    return told.draw


def test_imma_meets_other_names_too(make_trainer):
    trainer = make_trainer(objective="imma", trainable_modules="attention", attacker_rank=2,
                           attacker_conditions="none,random,mixed")
    trainer.train()
    assert all(entry["harmful_simulated_attack"] > 0 for entry in trainer.log_history)


def nothing_told(**options):
    from diffusers import UNet2DModel

    config = dict(build_denoiser("unet").config)
    torch.manual_seed(0)
    return UNet2DModel(**{name: value for name, value in config.items() if not name.startswith("_")} | options)


def one_prompt(rows):
    made = build_examples("sd", rows)
    made.conditions["encoder_hidden_states"] = torch.ones(rows, 5, 12)
    return made


def untold(rows):
    made = build_examples("unet", rows)
    return LatentDataset(made.latents, {}, made.labels, made.label_names)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"attacker_conditions": "token"}, ConfigError, "attacker_conditions among"),
        ({"attacker_conditions": "none,none"}, ConfigError, "each once"),
        ({"objective": "ill_only"}, ConfigError, "a simulated attacker .*'none', got .*ill_only"),
        ({"objective": "esd+ill_only"}, ConfigError, "a simulated attacker .*'none', got .*esd"),
        ({"objective": "imma", "trainable_modules": "attention", "attacker_rank": 2, "attacker_conditions": "learned"},
         ConfigError, "without learned for imma"),
        ({"family": "sd"}, DataError, "null_conditions.*encoder_hidden_states"),
        ({"family": "sd", "attacker_conditions": "random", "train": one_prompt(8), "harmful": one_prompt(4)}, DataError,
         "two different prompts"),
        ({"model": nothing_told(num_class_embeds=None), "train": untold(8), "harmful": untold(4)}, ModelError,
         "told nothing"),
        ({"model": nothing_told(class_embed_type="timestep", num_class_embeds=None)}, ModelError, "a table of class"),
    ],
)  # fmt: skip
def test_conditions_that_cannot_be_are_refused(options, error, words, make_trainer):
    with pytest.raises(error, match=words):
        make_trainer(**({"objective": "simulated_attack", "attacker_conditions": "none"} | options))
