"""Checkpointing and accumulation are exact, bf16 is close, and what could be silently wrong is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from step_builders import relative_error
from torch.distributed.fsdp import fully_shard
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.distributed import DistributedConfig

from hf_immunize.errors import ConfigError
from hf_immunize.linalg import second_moment_spectrum
from hf_immunize.regularizers import closed_form_adversary, ill_conditioned, simulated_attacker, well_conditioned
from hf_immunize.training import ImmunizationConfig
from hf_immunize.training.vision.forwards import Forwards
from hf_immunize.training.vision.support import is_sharded, refuse_accelerator, refuse_model

DOUBLE = torch.float64


def make_resnet(seed: int = 0) -> ResNetForImageClassification:
    torch.manual_seed(seed)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config)


@pytest.fixture
def gradients_of(make_trainer, keep_gradients):
    """Gradients of the last optimizer step of one run."""

    def run(**options):
        keeper = type(keep_gradients)()
        trainer = make_trainer(callbacks=[keeper], **{"max_steps": 1, "max_grad_norm": 0.0} | options)
        trainer.train()
        return keeper.steps[-1]

    return run


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "condition_number", "weight": "1", "strength": 1.0},
        {"objective": "closed_form_adversary", "sites": "lora", "gradient_accumulation_steps": 3},
        {"objective": "opt_kappa", "sites": "layers.0.mlp.fc2", "distillation": 1.0, "ema_decay": 0.5},
        {"objective": "imma", "trainable_modules": "last:1", "feature_bank_rows": 24, "max_steps": 2},
    ],
    ids=lambda options: options["objective"],
)
def test_activation_checkpointing_changes_no_gradient(gradients_of, make_vit, make_pixels, options):
    def run(**more):
        return gradients_of(
            model=make_vit(dtype=DOUBLE, dropout=0.2),
            primary=make_pixels(24, dtype=DOUBLE),
            harmful=make_pixels(30, seed=1, dtype=DOUBLE),
            **options,
            **more,
        )

    # imma's trainable part is one layer, the last: every second one would be none of it.
    every = 1 if options["objective"] == "imma" else 2
    kept = run(activation_checkpointing=True, activation_checkpointing_kwargs={"every_n_layers": every})
    assert relative_error(kept, run()) <= 1e-12


def test_checkpointing_really_repeats_the_forward(gradients_of, make_vit):
    calls = {}
    for on in (False, True):
        model = make_vit()
        calls[on] = 0

        def count(*_, on=on):
            calls[on] += 1

        model.vit.layers[0].mlp.fc1.register_forward_hook(count)
        gradients_of(model=model, activation_checkpointing=on)
    assert calls[True] == calls[False] + 2  # one step, of a primary and a harmful forward


def test_statistics_of_the_batch_are_those_of_both_passes_when_accumulating(make_trainer, monkeypatch):
    """With freeze_norm_statistics=False primary features depend on the micro-batch; terms are of these features."""
    seen, original = [], Forwards.measured

    def watch(self, caught, inputs):
        seen.extend(caught[side][self.head].detach().clone() for side in ("primary", "harmful"))
        return original(self, caught, inputs)

    monkeypatch.setattr(Forwards, "measured", watch)
    model = make_resnet()
    trainer = make_trainer(
        model=model, gradient_accumulation_steps=2, max_steps=1, freeze_norm_statistics=False, learning_rate=0.0
    )
    trainer.train()
    first, second = seen[:4], seen[4:]
    assert len(first) == len(second) == 4
    # Running statistics, which harmful rows are normalized with, go on learning from primary rows in the second pass.
    assert all(torch.allclose(first[place], second[place], atol=1e-6) for place in (0, 2))
    tracked = [module.num_batches_tracked for module in model.modules() if hasattr(module, "num_batches_tracked")]
    assert tracked and {int(count) for count in tracked} == {2}  # micro-batches, each counted once


@pytest.mark.parametrize(
    "network,objective,tolerance",
    [
        ("vit", "condition_number", 0.02),
        ("vit", "closed_form_adversary", 0.1),
        ("vit", "imma", 0.02),
        ("vit", "group_kappa", 0.2),  # log κ of 9 rows: rounding reaches the smallest of their eigenvalues
        ("resnet", "condition_number", 0.1),
        ("resnet", "closed_form_adversary", 0.1),
        ("resnet", "group_kappa", 0.2),
    ],
)
def test_a_step_under_bf16_autocast_is_close_to_float32(
    gradients_of, make_vit, make_pixels, network, objective, tolerance
):
    def run(half: bool):
        return gradients_of(
            model=make_vit() if network == "vit" else make_resnet(),
            primary=make_pixels(24),
            harmful=make_pixels(40, seed=1),
            objective=objective,
            weight="1",
            strength=1.0,
            primary_loss_weight=1e-6,  # so that it is the terms' gradient
            harmful_group_rows=9,
            memorization=0.0,  # R² on known rows leans on their smallest directions: 0.13 on the ResNet with it
            per_device_train_batch_size=24,
            per_device_harmful_batch_size=24,
            bf16=half,
        )

    single, half = run(False), run(True)
    assert 1e-4 < relative_error(half, single) <= tolerance  # autocast was on, and did little harm


def test_linear_algebra_stays_in_float64_under_autocast():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(24, 6, generator=generator, dtype=DOUBLE) * torch.logspace(0, -3, 6, dtype=DOUBLE)
    labels = torch.arange(24) % 3

    def measured() -> list[torch.Tensor]:
        leaf = features.clone().requires_grad_()
        spectrum = second_moment_spectrum(leaf)
        start = torch.zeros(6, 3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
        attacked, _ = simulated_attacker(leaf, labels, start, rate=torch.ones((), dtype=DOUBLE), steps=3)
        values = [well_conditioned(spectrum), ill_conditioned(spectrum), attacked]
        values.append(closed_form_adversary(leaf, labels, horizon=30.0))
        return [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in values]

    truth = measured()
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        under = measured()
    assert all(torch.equal(one, other) and one.dtype == DOUBLE for one, other in zip(truth, under, strict=True))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"torch_compile": True}, "torch_compile off"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size off"),
        ({"torch_compile_backend": "eager"}, "torch_compile off"),
        ({"deepspeed": {}}, "no DeepSpeed, got it in the options"),
        ({"bf16_full_eval": True}, "bf16_full_eval off"),
        ({"fp16_full_eval": True}, "fp16_full_eval off"),
        ({"bf16": True, "objective": "opt_kappa"}, "mixed precision 'no' for the terms"),
        ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}, "reentrant"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "reentrant"),
        ({"activation_checkpointing": True, "trainable_modules": "last:1", "cache_frozen_features": True}, "got both"),
        ({"activation_checkpointing": True, "precondition_gradients": "layers.1.mlp.fc2"}, "got both"),
    ],
)
def test_options_that_would_be_silently_wrong_are_refused(make_trainer, options, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(**options)


@pytest.mark.parametrize(
    "variable,value,message",
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "no DeepSpeed, got it from accelerate's launcher"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed precision 'no' or 'bf16', got 'fp16'"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "no dynamo backend from accelerate's launcher"),
    ],
)
def test_what_only_the_launcher_asks_for_is_refused(make_trainer, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        make_trainer()


def test_other_engines_of_accelerate_are_refused():
    def accelerator(kind="DistributedType.MULTI_GPU", **state):
        return SimpleNamespace(state=SimpleNamespace(**state), distributed_type=kind)

    refuse_accelerator(accelerator())
    with pytest.raises(ConfigError, match="first Accelerator under FSDP"):
        refuse_accelerator(accelerator("DistributedType.FSDP", fsdp_plugin=object()))
    with pytest.raises(ConfigError, match="got MEGATRON_LM"):
        refuse_accelerator(accelerator("DistributedType.MEGATRON_LM"))


def test_models_that_were_changed_before_are_refused(make_trainer, make_vit):
    compiled, reentrant, checkpointed = make_vit(), make_vit(), make_vit()
    compiled.compile()
    with pytest.raises(ConfigError, match="not compiled"):
        make_trainer(model=compiled)
    with pytest.raises(ConfigError, match="not compiled"):
        make_trainer(model=torch.compile(make_vit()))
    reentrant.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match="reentrant"):
        make_trainer(model=reentrant)
    checkpointed.activation_checkpointing_enable()
    make_trainer(model=checkpointed)
    with pytest.raises(ConfigError, match="activation_checkpointing_disable"):
        make_trainer(model=checkpointed, trainable_modules="last:1", cache_frozen_features=True)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "options,message",
    [
        ({"precondition_gradients": "fc2"}, "precondition_gradients.*sharded parameters.*use DDP"),
        ({"objectives": ["imma"], "attacker_rank": 4}, "attacker_rank with imma.*sharded parameters"),
        ({"objectives": ["simulated_attack"]}, "whole when it is passed for simulated_attack.*accelerate launch"),
    ],
)
def test_sharded_models_are_refused_where_whole_weights_are_needed(one_process, make_vit, options, message):
    model, plain = make_vit(), {"precondition_gradients": None, "attacker_rank": 0, "objectives": ["opt_kappa"]}
    asked = SimpleNamespace(**plain | options)
    refuse_model(asked, model)
    fully_shard(model)
    assert is_sharded(model)
    refuse_model(SimpleNamespace(**plain), model)
    with pytest.raises(ConfigError, match=message):
        refuse_model(asked, model)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version 2, got 1.*Set fsdp_version: 2"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "without fsdp_cpu_ram_efficient_loading.*Set it to false"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "without fsdp_offload_params"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "without fsdp_activation_checkpointing.*gradient_checkpointing"),
        ({"FSDP_IGNORED_MODULES": "vit.embeddings"}, "without fsdp_ignored_modules"),
    ],
)
def test_ways_of_fsdp_that_are_not_exact_or_were_never_tried_are_refused(make_trainer, monkeypatch, options, message):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **options}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        make_trainer()


def test_one_process_under_a_launcher_that_asks_for_fsdp_trains_whole_weights(make_trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert not trainer.is_split and not is_sharded(trainer.model)


def test_the_fsdp_option_wants_several_processes_and_version_2(make_trainer):
    with pytest.raises(ConfigError, match="several processes for fsdp, got one"):
        make_trainer(fsdp=True)
    with pytest.raises(ConfigError, match="fsdp_version 2, got 1"):
        make_trainer(fsdp=True, fsdp_config={"version": 1})


@pytest.mark.parametrize("options", [{"tp_size": 2}, {"fsdp_size": 2, "dp_replicate_size": 2}])
def test_other_ways_to_split_a_model_are_refused(make_trainer, make_vit, options):
    model = make_vit()
    model.config.distributed_config = DistributedConfig(**options)
    with pytest.raises(ConfigError, match="fsdp_size only, got"):
        make_trainer(model=model)


def test_of_several_visible_gpus_one_is_used_and_said(monkeypatch, tmp_path, caplog):
    from functools import cached_property

    from transformers import TrainingArguments

    @cached_property
    def four_gpus(self):
        self._n_gpu = 4
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", four_gpus)
    four_gpus.__set_name__(TrainingArguments, "_setup_devices")
    with caplog.at_level("WARNING", logger="hf_immunize.training.vision.support"):
        args = ImmunizationConfig(str(tmp_path), per_device_train_batch_size=8, report_to="none")
    assert args.n_gpu == 1 and args.train_batch_size == 8
    assert "4 GPUs are visible to one process, and one is used" in caplog.text
