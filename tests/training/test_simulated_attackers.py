"""Who a simulated attacker of an image model may be, and that every gradient is its value's: finite differences."""

from __future__ import annotations

import copy

import pytest
import torch
from step_builders import relative_error
from transformers import ResNetConfig, ResNetForImageClassification

from hf_immunize.errors import ConfigError
from hf_immunize.training.core import distributed
from hf_immunize.training.core.habits import Habits, habits_of
from hf_immunize.training.vision import harmful_loss, setup

TERM = "harmful_simulated_attack"
SILENT = {"learning_rate": 0.0, "max_steps": 1, "weight": "1", "strength": 1.0, "per_device_harmful_batch_size": 60}


@pytest.fixture
def attacked(make_trainer, make_vit):
    """A model in float64 and the term at work in a run of it, whose learning rate is 0."""

    def build(model=None, objective="simulated_attack", **options):
        model = model or make_vit(dtype=torch.float64)
        trainer = make_trainer(model=model, objective=objective, **(SILENT | options))
        trainer.train()
        (term,) = trainer.step.weight_terms.objectives.values()
        return model.train(), term, trainer

    return build


def slope_by_differences(model, term, step=3, size=1e-6):
    """d H / d direction at the weights by central differences, and the same from the gradient."""
    generator = torch.Generator().manual_seed(0)
    _, gradient = term.gradient(model, step)
    direction = {name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
                 for name, value in gradient.items()}  # fmt: skip
    ends = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, value in moved.named_parameters():
                value += sign * size * direction.get(name, 0)
        ends.append(float(term.gradient(moved, step)[0]))
    told = sum(float((gradient[name] * direction[name]).sum()) for name in direction)
    return (ends[0] - ends[1]) / (2 * size), told


def hold_the_ridge(monkeypatch):
    """A head whose ridge is a number: the attacker's own follows his features, and is no way out for the defender.

    What it says of features is compared in test_simulated_attack_on_images.py. Features of random weights tell nothing,
    so the ceiling is raised until there is a gradient.
    """

    def head(x, y, judged, wanted, horizon, dtype):
        centre, mean = x.mean(0), y.double().mean(0)
        weights = torch.linalg.solve((x - centre).T @ (x - centre) + torch.eye(x.shape[1]).double(),
                                     (x - centre).T @ (y - mean))  # fmt: skip
        left = wanted - mean - (judged - centre) @ weights
        return 1 - left.square().sum() / (wanted - mean).square().sum(), None

    monkeypatch.setattr(harmful_loss, "spectral_adversary", head)
    monkeypatch.setattr(setup, "CHANCE", 5.0)


@pytest.fixture
def two_ranks(monkeypatch):
    """As if another rank had the same rows; how often all ranks' tensors were summed."""
    calls = []

    def all_reduce(flat):
        calls.append(flat.numel())
        flat *= 2

    def begin():
        monkeypatch.setattr(distributed, "world", lambda: (0, 2))
        monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
        return calls

    return begin


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("options", [
    {}, {"attacker_head": "fresh"}, {"attacker_rank": 2}, {"objective": "sophon_ice"}, {"objective": "tar_entropy"},
], ids=str)
def test_ranks_exchange_one_sum_for_each_gradient_the_attacker_takes(attacked, two_ranks, options, steps):
    """His steps and one more for what the defender gets, each with the number that belongs to it."""
    model, term, _ = attacked(**{"attacker_steps": steps, "attacker_learning_rate": 1e-2, **options})
    value, gradient = term.gradient(model, 3)
    calls = two_ranks()
    again, same = term.gradient(model, 3)
    assert len(calls) == steps + 1 and min(calls) > 100
    assert float(again) == pytest.approx(float(value), rel=1e-12)
    assert all(torch.allclose(same[name], held, rtol=1e-12, atol=1e-15) for name, held in gradient.items())


WITHOUT_STEPS = {
    "refitted head": {},
    "several depths": {"attacker_depths": "vit.layers.1,vit.layernorm,classifier"},
    "inverse cross-entropy": {"objective": "sophon_ice"},
    "uniform": {"objective": "sophon_klu"},
    "entropy": {"objective": "tar_entropy"},
}


@pytest.mark.parametrize(
    "options", [pytest.param(options, id=name, marks=[pytest.mark.slow] * (name in ("uniform", "entropy")))
                for name, options in WITHOUT_STEPS.items()],
)  # fmt: skip
def test_where_the_attacker_stands_still_the_first_order_gradient_is_exact(options, attacked, monkeypatch):
    """At rate 0 every θ_k is θ."""
    hold_the_ridge(monkeypatch)
    model, term, _ = attacked(**({"attacker_learning_rate": 0.0, "attacker_steps": 2} | options))
    truth, told = slope_by_differences(model, term)
    assert abs(truth) > 1e-4 and told == pytest.approx(truth, rel=1e-4)


def test_the_exact_gradient_is_that_of_the_whole_attack_and_the_first_order_one_is_not(attacked, monkeypatch):
    hold_the_ridge(monkeypatch)
    options = {"attacker_learning_rate": 3e-2, "attacker_steps": 2}
    model, term, _ = attacked(attacker_second_order=True, **options)
    truth, told = slope_by_differences(model, term)
    assert abs(truth) > 1e-4 and told == pytest.approx(truth, rel=1e-3)
    model, plain, _ = attacked(**options)
    assert abs(slope_by_differences(model, plain)[1] - truth) > 0.05 * abs(truth)


def test_optimizer_and_rate_are_drawn_over_decades_alike_on_every_rank():
    habits = Habits(1e-3, ("adamw", "sgd"), 2.0)
    drawn = [habits.draw(0, step) for step in range(200)]
    assert drawn == [habits.draw(0, step) for step in range(200)]
    rates = {name: [rate for found, rate in drawn if found == name] for name in ("adamw", "sgd")}
    assert min(len(found) for found in rates.values()) > 60
    assert 1e-4 <= min(rates["adamw"]) < 2e-4 and 5e-3 < max(rates["adamw"]) <= 1e-2
    assert 1e-2 <= min(rates["sgd"]) < 2e-2 and 0.5 < max(rates["sgd"]) <= 1.0
    assert Habits(1e-3).draw(0, 1) == ("adamw", 1e-3)
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert isinstance(Habits(1e-3, ("sgd",)).optimizer([parameter], 0), torch.optim.SGD)


def test_an_attack_with_sgd_is_the_attack_written_out(attacked):
    model, term, trainer = attacked(attacker_optimizers="sgd", attacker_learning_rate=1e-3, attacker_steps=1)
    value, gradient = term.gradient(model, 0)
    attacker, task = copy.deepcopy(model).train(), term._task
    optimizer = torch.optim.SGD(attacker.parameters(), lr=0.1, momentum=0.9)
    task.loss(attacker, 0, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = task.loss(attacker, 0, 1)
    loss.backward()
    assert float(value) == pytest.approx(max(0.0, 1 - float(loss)), abs=1e-12)
    if float(loss) < 1:
        truth = {name: -parameter.grad for name, parameter in attacker.named_parameters() if parameter.grad is not None}
        assert relative_error({name: gradient[name] for name in truth}, truth) < 1e-9


def test_an_attacker_who_draws_his_last_blocks_anew_does_not_see_them(attacked):
    model, term, _ = attacked(attacker_resets=2, attacker_steps=1, attacker_learning_rate=1e-3)
    counts, seen = {}, {}
    for step in range(12):
        fresh = term._task.fresh(step)
        assert not any(name.startswith("classifier") for name in fresh)
        blocks = {name.split(".")[2] for name in fresh if name.startswith("vit.layers.")}
        counts[step] = len(blocks)
        assert blocks == {"1", "0"} or blocks == {"1"} or not fresh
        value, gradient = term.gradient(model, step)
        assert all(not bool(gradient[name].any()) for name in fresh)
        if fresh:
            moved = copy.deepcopy(model)
            with torch.no_grad():
                moved.vit.layers[1].mlp.fc1.weight.add_(1.0)
            assert float(term.gradient(moved, step)[0]) == float(value)
        seen[len(blocks)] = any(bool(part.any()) for part in gradient.values())
    assert set(counts.values()) == {0, 1, 2} and seen[0]


def test_batch_norm_runs_as_fine_tuning_runs_it_and_learns_nothing(make_trainer, make_pixels):
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    ))  # fmt: skip
    values = {}
    for norms in ("frozen", "batch"):
        trainer = make_trainer(model=copy.deepcopy(model), objective="simulated_attack", attacker_norms=norms, **SILENT)
        trainer.train()
        (term,) = trainer.step.weight_terms.objectives.values()
        before = {name: value.clone() for name, value in term._attacker.model.named_buffers()}
        values[norms] = float(term.gradient(trainer.model.train(), 0)[0])
        assert all(torch.equal(before[name], value) for name, value in term._attacker.model.named_buffers())
    assert values["frozen"] != values["batch"]
    # θ itself, its features normalized by the batch, as any training forward has them
    rows = trainer._attack_batch(0)
    plain = copy.deepcopy(trainer.model).train()
    truth = plain.resnet(rows["pixel_values"]).pooler_output.flatten(1)
    found, _, _ = term._task.features(copy.deepcopy(trainer.model).train(), 0, 0)
    assert torch.allclose(found, truth, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"attacker_head": "new"}, "attacker_head in"), ({"attacker_norms": "train"}, "attacker_norms in"),
     ({"attacker_resets": -1}, "at least 0"), ({"attacker_resets": 1, "attacker_rank": 2}, "attacker_rank=0"),
     ({"objective": "sophon_ice", "attacker_head": "fresh"}, "objective simulated_attack for attacker_head"),
     ({"attacker_head": "fresh", "attacker_second_order": True}, "got several"),
     ({"attacker_optimizers": "adam"}, "attacker_optimizers among"), ({"attacker_rate_decades": -1.0}, "at least 0"),
     ({"attacker_second_order": True, "attacker_optimizers": "sgd"}, "smoothed AdamW"),
     ({"objective": "imma", "attacker_rate_decades": 1.0}, "goes on from step to step")],
)  # fmt: skip
def test_attackers_that_cannot_be_are_refused(options, words, make_trainer):
    with pytest.raises(ConfigError, match=words):
        make_trainer(**({"objective": "simulated_attack"} | options))


def test_more_resets_than_blocks_are_refused(make_trainer, make_vit):
    with pytest.raises(ValueError, match="at most 2"):
        make_trainer(model=make_vit(), objective="simulated_attack", attacker_resets=3)


def test_a_run_with_everything_drawn_resumes_exactly(make_trainer, make_vit, tmp_path):
    options = {"objective": "simulated_attack", "attacker_resets": 1, "attacker_optimizers": "adamw,sgd",
               "attacker_rate_decades": 2.0, "attacker_depths": "vit.layernorm,classifier", "attacker_steps": 1,
               "max_steps": 4, "save_strategy": "steps", "save_steps": 2}  # fmt: skip
    whole = make_trainer(model=make_vit(), **options)
    whole.train()
    again = make_trainer(model=make_vit(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(value, again.model.state_dict()[name], atol=1e-6), name
    assert habits_of(whole.args).decades == 2
