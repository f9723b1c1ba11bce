"""Every optimizer that TrainingArguments.optim names: transformers' own, resumed bit for bit, or refused by name."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from denoiser_builders import build_denoiser, build_examples
from transformers.optimization import Adafactor
from transformers.training_args import OptimizerNames

from hf_immunize.errors import ConfigError, RecordError
from hf_immunize.training.diffusion import DiffusionImmunizationConfig
from hf_immunize.training.diffusion.optimizer_state import flatten_state, restore_state
from hf_immunize.training.diffusion.optimizers import optimizer_of

PLAIN = {
    "adamw_torch": None, "adamw_torch_fused": None, "adafactor": None, "sgd": "momentum=0.9,nesterov=true",
    "adagrad": None, "rmsprop": "momentum=0.5,centered=true",
}  # fmt: skip
PACKAGES = {
    "adamw_bnb_8bit": "bitsandbytes", "adamw_torch_8bit": "torchao", "schedule_free_adamw": "schedulefree",
    "galore_adamw": "galore_torch", "apollo_adamw": "apollo_torch", "lomo": "lomo_optim", "grokadamw": "grokadamw",
    "stable_adamw": "optimi", "adamw_anyprecision": "torchdistx",
}  # fmt: skip
INSTALLED = [name for name in ("adamw_bnb_8bit", "adamw_torch_8bit", "schedule_free_adamw", "lion_8bit")
             if importlib.util.find_spec(PACKAGES.get(name, "bitsandbytes"))]
OPTIONS = {"max_steps": 4, "save_steps": 2, "save_total_limit": 2, "sites": "middle", "objective": "ill_only",
           "max_loss_factor": 5.0, "eval_steps": 1}


def config(tmp_path, **options):
    return DiffusionImmunizationConfig(str(tmp_path), use_cpu=True, learning_rate=1e-2, **options)


@pytest.fixture
def no_compiler():
    """torchao compiles its step, for minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("optim", [*PLAIN, *INSTALLED])
def test_a_run_resumes_exactly_with_any_of_them(make_trainer, tmp_path, no_compiler, optim):
    options = OPTIONS | {"optim": optim, "optim_args": PLAIN.get(optim)}
    held = build_examples("unet", 6, seed=5)
    whole = make_trainer(evaluation=held, **options)
    whole.train()
    resumed = make_trainer(evaluation=held, **options)
    resumed.train(tmp_path / "run" / "checkpoint-2")
    found = resumed.bare.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in whole.bare.state_dict().items())
    first, second = (flatten_state(trainer.optimizer) for trainer in (whole, resumed))
    assert first[1] == second[1] and all(torch.equal(value, second[0][name]) for name, value in first[0].items())
    before = build_denoiser("unet").state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in found.items())


def test_the_optimizer_is_transformers_own_with_its_arguments(tmp_path):
    model = torch.nn.Linear(3, 2)

    def made(**options):
        return optimizer_of(config(tmp_path, **options), model, list(model.parameters()))

    default = made(weight_decay=0.1)
    assert type(default) is torch.optim.AdamW
    truth = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    assert default.state_dict() == truth.state_dict()  # what this trainer always used
    assert type(made(optim="adafactor")) is Adafactor
    assert made(optim="sgd", optim_args="momentum=0.9").param_groups[0]["momentum"] == 0.9
    assert made(optim="rmsprop", weight_decay=0.2).param_groups[0]["weight_decay"] == 0.2


@pytest.mark.parametrize("optim", sorted({name.value for name in OptimizerNames} - set(PLAIN)))
def test_what_cannot_be_had_is_refused_by_name(tmp_path, optim):
    """Each name makes an optimizer, or is a ConfigError with what transformers says of it."""
    model = build_denoiser("dit")
    try:
        made = optimizer_of(config(tmp_path, optim=optim, optim_target_modules="all-linear"), model,
                            list(model.parameters()))
    except ConfigError as error:
        assert f"optim='{optim}'" in str(error)
    else:
        assert isinstance(made, torch.optim.Optimizer)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"optim": "adam"}, "an optim of TrainingArguments that is installed.*'adam'"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim_args='momentum'"),
        ({"optim": "sgd", "optim_args": "momentum=much"}, "could not convert string to float"),
    ],
)
def test_names_and_arguments_that_do_not_exist_are_refused(tmp_path, options, message):
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ConfigError, match=message):
        optimizer_of(config(tmp_path, **options), model, list(model.parameters()))


class Odd(torch.optim.SGD):
    """State of every kind that is met among optimizers, and then some."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        for group in self.param_groups:
            group |= {"k": 3, "kind": torch.bfloat16, "betas": (0.9, 0.99), "scheduled_lr": 0.1, "weight_sum": 1 / 3}
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": 7, "rate": 0.1 + 0.2, "wide": torch.full((2,), 1 / 3, dtype=torch.float64),
                    "small": torch.arange(4, dtype=torch.uint8), "half": torch.ones(2).bfloat16(), "none": None,
                    "nested": {"list": [torch.ones(2), 1.5], 4: (True, "text")}, "step_tensor": torch.tensor(7.0),
                }


def test_state_of_every_kind_comes_back_bit_for_bit_through_json():
    kept = Odd([torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))])
    tensors, tree = flatten_state(kept)
    other = Odd([torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))])
    for held in other.state.values():
        held |= {"step": 0, "rate": 0.0, "nested": None}
    other.param_groups[0]["k"] = 0
    restore_state(other, {name: value.clone() for name, value in tensors.items()}, json.loads(json.dumps(tree)))
    first, second = kept.state_dict(), other.state_dict()
    assert first["param_groups"] == second["param_groups"]
    for place, held in first["state"].items():
        mine = second["state"][place]
        assert {n: type(v) for n, v in held.items()} == {n: type(v) for n, v in mine.items()}
        assert (held["step"], held["rate"], held["none"]) == (mine["step"], mine["rate"], mine["none"])
        for name in ("wide", "small", "half", "step_tensor"):
            assert torch.equal(held[name], mine[name]) and held[name].dtype == mine[name].dtype
        assert torch.equal(held["nested"]["list"][0], mine["nested"]["list"][0])
        assert held["nested"]["list"][1] == mine["nested"]["list"][1] and held["nested"][4] == mine["nested"][4]


def test_what_cannot_be_stored_is_refused_and_no_class_is_made_but_tensors_of_torchao():
    optimizer = Odd([torch.nn.Parameter(torch.zeros(2))])
    next(iter(optimizer.state.values()))["projector"] = object()
    with pytest.raises(RecordError, match="got object in state.0.projector: set save_steps=0"):
        flatten_state(optimizer)
    whole = flatten_state(Odd([torch.nn.Parameter(torch.zeros(2))]))
    for name in ("subprocess.Popen", "torchao.nothing.Here"):
        tree = whole[1] | {"state": {"made": name, "parts": {}, "context": {"value": None}}}
        with pytest.raises((ValueError, ImportError)):
            restore_state(Odd([torch.nn.Parameter(torch.zeros(2))]), whole[0], tree)


@pytest.mark.parametrize("optim", ["adamw_torch", *INSTALLED])
def test_moments_of_wide_layers_come_back_bit_for_bit(tmp_path, no_compiler, optim):
    """8-bit optimizers quantize the moments of tensors with at least 4096 entries only."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(128, 64, generator=generator), torch.randn(5, 128, 64, generator=generator)

    def made(weight):
        parameter = torch.nn.Parameter(weight.clone())
        return parameter, optimizer_of(config(tmp_path, optim=optim), torch.nn.Linear(64, 128), [parameter])

    def steps(parameter, optimizer, some):
        if hasattr(optimizer, "train"):
            optimizer.train()
        for gradient in some:
            parameter.grad = gradient.clone()
            optimizer.step()

    one, first = made(start)
    steps(one, first, gradients[:3])
    tensors, tree = flatten_state(first)
    two, second = made(one.detach())
    restore_state(second, {name: value.clone() for name, value in tensors.items()}, json.loads(json.dumps(tree)))
    for parameter, optimizer in ((one, first), (two, second)):
        steps(parameter, optimizer, gradients[3:])
    assert torch.equal(one, two) and not torch.equal(one, start)
    if "8bit" in optim:
        assert sum(value.nbytes for value in tensors.values() if value.numel() > 256) < 0.6 * 8 * start.numel()
