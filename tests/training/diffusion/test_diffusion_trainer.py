"""Every family trains, changes what it should, keeps what it should not, and stops with its reason."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from denoiser_builders import build_denoiser, build_examples
from equality import depth, units_apart

from hf_immunize.errors import ConfigError, DataError, DeviceMemoryError, ModelError, TrainingDivergedError
from hf_immunize.training.diffusion import DiffusionImmunizationConfig


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_every_family_trains_three_steps_on_features_and_attacks(make_trainer, family):
    trainer = make_trainer(family, objective="condition_number+simulated_attack", attacker_steps=2)
    before = weights(trainer.bare)
    log = trainer.train()
    assert [entry["step"] for entry in log] == [1, 2, 3]
    last = log[-1]
    assert {"retain_loss", "harmful_r_ill", "primary_r_well", "harmful_simulated_attack"} <= set(last)
    assert all(math.isfinite(value) for value in last.values())
    assert all(last[f"lambda/harmful_r_ill/{site}"] >= 0 for site in trainer.terms.sites)
    assert not equal(before, weights(trainer.bare))
    middle = trainer.denoiser.middle(trainer.bare)
    assert middle in trainer.terms.sites and len(trainer.terms.sites) >= 2


def test_text_embeddings_are_no_site_and_shared_inputs_count_once(make_trainer):
    sites = make_trainer("sd", sites="attention").terms.sites
    assert not [site for site in sites if site.endswith(("attn2.to_k", "attn2.to_v"))]
    assert any(site.endswith("attn2.to_q") for site in sites) and any(site.endswith("attn1.to_q") for site in sites)
    assert not [site for site in sites if site.endswith(("attn1.to_k", "attn1.to_v"))]
    name = "transformer_blocks.1.attn1.to_v"
    assert make_trainer("dit", sites=name).terms.sites == [name]


def test_gradients_are_those_of_the_whole_objective_by_finite_differences(make_trainer):
    """Retain loss + λ·terms at all sites, with fixed weights, against central differences along a random direction."""
    from hf_immunize.features import capture_inputs
    from hf_immunize.training.core.terms import Rows, TermSettings

    trainer = make_trainer(
        "unet", dtype=torch.float64, objective="opt_kappa", weight="0.3", strength=1.0, min_snr_gamma=5.0,
        distillation=0.5, max_grad_norm=0.0,
    )
    trainer._measure_base()
    trainer.compute_gradients()
    torch.manual_seed(0)
    parameters = list(trainer.bare.parameters())
    direction = [torch.randn_like(parameter) for parameter in parameters]
    found = sum(float((p.grad * d).sum()) for p, d in zip(parameters, direction, strict=True) if p.grad is not None)

    @torch.no_grad()
    def objective() -> float:
        retain = trainer._batch(trainer.streams.retain, 0)
        harmful = trainer._batch(trainer.streams.harmful, 0)
        caught = {}
        for side, batch in (("primary", retain), ("harmful", harmful)):
            with capture_inputs(trainer.bare, trainer.terms.sites) as captured:
                answer = trainer._answer(trainer.bare, batch)
            caught[side] = dict(captured.items())
            if side == "primary":
                snr = (trainer.process.signal_T / trainer.process.noise_T).square()[batch.levels]
                weight = snr.clamp(max=5.0) / snr
                errors = (answer - batch.target).square().mean(dim=(1, 2, 3))
                teacher = trainer._answer(trainer.teacher, batch)
                value = (weight * errors).mean() + 0.5 * (answer - teacher).square().mean()
        for site in trainer.terms.sites:
            for term in trainer.terms.objective.terms:
                rows = Rows(caught[term.side][site], torch.zeros(len(caught[term.side][site])))
                value = value + 0.3 * term.measure(rows, TermSettings()) / len(trainer.terms.sites)
        return float(value)

    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, moved in zip(parameters, direction, strict=True):
                parameter.add_(sign * step * moved)
        values.append(objective())
        with torch.no_grad():
            for parameter, moved in zip(parameters, direction, strict=True):
                parameter.sub_(sign * step * moved)
    assert found == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_accumulation_gives_the_gradient_of_one_batch(make_trainer):
    """Two micro-batches of 6 are one batch of 12: spectra are of all rows, not means over micro-batches."""
    found = {}
    for count in (1, 2):
        trainer = make_trainer(
            dtype=torch.float64, objective="condition_number+group_kappa", gradient_accumulation_steps=count,
            per_device_train_batch_size=12 // count, per_device_harmful_batch_size=16 // count, weight="1",
            strength=0.1, harmful_group_rows=16,
        )
        # Noise is drawn per row of a micro-batch: give both the same rows and noise through one long batch.
        whole = {name: make_whole(trainer, name, count) for name in ("retain", "harmful")}
        trainer._batch = lambda stream, micro, whole=whole, count=count, trainer=trainer: part(
            whole["retain" if stream is trainer.streams.retain else "harmful"], micro, count
        )
        trainer.compute_gradients()
        found[count] = {name: p.grad.clone() for name, p in trainer.bare.named_parameters() if p.grad is not None}
    for name, truth in found[1].items():
        assert torch.allclose(found[2][name], truth, rtol=1e-8, atol=1e-12), name


def make_whole(trainer, name, count):
    from hf_immunize.training.diffusion.stream import NoisyStream

    data = build_examples("unet", 16, seed=0 if name == "retain" else 1, dtype=torch.float64)
    rows = 12 if name == "retain" else 16
    return NoisyStream(data, trainer.process, rows, seed=1, name=name).batch(0, torch.device("cpu"), torch.float64)


def part(batch, micro, count):
    import dataclasses

    size = len(batch.labels) // count
    rows = slice(micro * size, (micro + 1) * size)
    fields = {f.name: getattr(batch, f.name)[rows] for f in dataclasses.fields(batch) if f.name != "conditions"}
    return type(batch)(**fields, conditions={name: value[rows] for name, value in batch.conditions.items()})


def test_gradient_checkpointing_changes_nothing_but_memory(make_trainer):
    found = []
    for checkpointing in (False, True):
        trainer = make_trainer("dit", dtype=torch.float64, gradient_checkpointing=checkpointing)
        trainer._measure_base()
        trainer.compute_gradients()
        found.append({name: p.grad for name, p in trainer.bare.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-8, atol=1e-12) for name in found[0])


def test_only_attention_is_trained_when_asked(make_trainer):
    trainer = make_trainer("dit", trainable="attention")
    before = weights(trainer.bare)
    trainer.train()
    changed = {name for name, value in trainer.bare.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".attn1.to_" in name for name in changed)


def test_the_feature_terms_do_what_they_are_for(make_trainer):
    """With a strong opt_kappa the harmful spectrum spreads over a run; without strength it does not."""
    spread = {}
    for strength in (0.0, 1.0):
        trainer = make_trainer(
            "unet", objective="opt_kappa", strength=strength, max_steps=8, learning_rate=5e-3, sites="middle",
            per_device_harmful_batch_size=12,
        )
        log = trainer.train()
        spread[strength] = log[-1]["harmful_log_kappa"] - log[0]["harmful_log_kappa"]
    assert spread[1.0] > spread[0.0] + 0.5


def test_the_guard_lowers_the_strength_and_returns_the_last_weights_that_kept_the_retain_loss(make_trainer):
    """The loss after each step is scripted, the weights are real: only step 1 keeps it."""
    kept = {}
    trainer = make_trainer(
        evaluation=build_examples("unet", 8, seed=5), max_loss_factor=1.02, max_steps=4, eval_steps=1,
        before_update=lambda made: kept.setdefault(made.step, weights(made.bare)),
    )
    scripted = iter([0.0, -1.5, -2.5, -9.0, -7.0, -1.5])
    trainer._points = lambda: next(scripted)
    trainer._guarded._went_on = lambda: False  # whether the last terms were better, rounding decides
    trainer.train()
    record = trainer.guard_record
    assert record.held and record.returned_step == 1 and record.allowed == pytest.approx(100 * math.log(1.02))
    assert [row["drop"] for row in record.history] == [1.5, 2.5, 9.0, 7.0]
    assert trainer.terms.factor == 1.0 / 8
    assert equal(weights(trainer.bare), kept[1])


def test_weights_that_never_keep_the_retain_loss_are_not_returned(make_trainer):
    trainer = make_trainer(
        evaluation=build_examples("unet", 8, seed=5), max_loss_factor=1.02, max_steps=2, eval_steps=1
    )
    before, scripted = weights(trainer.bare), iter([0.0, -3.0, -3.0, *[-3.0] * 5, 0.0])
    trainer._points = lambda: next(scripted)
    trainer.train()
    assert equal(weights(trainer.bare), before) and trainer.guard_record.returned_step == 0


def test_with_an_average_the_average_is_judged_and_returned(make_trainer):
    seen = []
    trainer = make_trainer(
        ema_decay=0.5, max_steps=4, evaluation=build_examples("unet", 8, seed=5), validation_steps=2,
        validate=lambda model, step: seen.append((step, model.training, weights(model))),
    )
    trainer.train()
    shadow = trainer.average.mean
    assert all(torch.equal(value, shadow[name]) for name, value in trainer.bare.named_parameters())
    assert [(step, training) for step, training, _ in seen] == [(2, False), (4, False)]
    assert not equal(seen[0][2], seen[1][2]) and equal(seen[1][2], weights(trainer.bare))


def with_labels(label):
    made = build_examples("unet", 8)
    made.conditions["class_labels"] = torch.full((8,), label)
    return made


def longer_text(family):
    made = build_examples(family, 8, label=9)
    states = made.conditions["encoder_hidden_states"]
    made.conditions["encoder_hidden_states"] = torch.cat([states, states], dim=1)
    return made


def narrow_text(family):
    made = build_examples(family, 8)
    made.conditions["encoder_hidden_states"] = made.conditions["encoder_hidden_states"][..., :7]
    return made


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"objective": "magic"}, ConfigError, "expected objectives among"),
        ({"sites": "nowhere"}, ModelError, "expected modules of UNet2DModel for site 'nowhere'"),
        ({"max_loss_factor": 1.1}, ConfigError, "expected an eval_dataset"),
        ({"max_loss_factor": 0.9}, ConfigError, "at least 1"),
        ({"mixed_precision": "fp16"}, ConfigError, "fp16 scales gradients"),
        ({"site_levels": "0.8,0.2"}, ConfigError, "low < high"),
        ({"site_levels": "all"}, ConfigError, "expected site_levels like"),
        ({"weight": "nothing=1"}, ConfigError, "expected weight of terms"),
        ({"attacker_steps": 0}, ConfigError, "attacker_steps of at least 1"),
        ({"trainable": "some"}, ConfigError, "'all', 'attention' or 'lora'"),
        ({"attacker_renamed": 1.5}, ConfigError, "between 0 and 1"),
        ({"objective": "imma", "trainable": "lora"}, ConfigError, "imma as it was published"),
        ({"objective": "imma+simulated_attack", "trainable": "attention", "attacker_rank": 2}, ConfigError, "beside"),
        ({"trainable": "lora", "lora_rank": 0}, ConfigError, "lora_rank of at least 1"),
        ({"primary_loss_weight": 0.0}, ConfigError, "keeps the model"),
        ({"harmful": build_examples("unet", 1, label=9)}, DataError, "at least two images"),
        ({"objective": "closed_form_adversary"}, DataError, "at least two classes in harmful_dataset.*got 1"),
        ({"harmful": build_examples("sd", 4)}, DataError, "encode the images with the VAE"),
        ({"harmful": build_examples("unet", 4, label=9, size=6)}, DataError, "a resolution it knows|one resolution"),
        ({"harmful_eval_dataset": build_examples("unet", 4, label=9, size=4)}, DataError, "harmful_eval_dataset: e"),
        ({"harmful_eval_dataset": build_examples("sd", 4)}, DataError, "^harmful_eval_dataset: expected .*VAE"),
        ({"harmful_eval_dataset": with_labels(11)}, DataError, r"^harmful_eval_dataset: .*class labels in 0\.\.9"),
        ({"evaluation": with_labels(11)}, DataError, r"^eval_dataset: .*class labels in 0\.\.9"),
        ({"train": with_labels(11)}, DataError, r"expected class labels in 0\.\.9 for UNet2DModel, got 11\.\.11"),
        ({"family": "sd", "train": narrow_text("sd")}, DataError, "rows of a size that UNet2DConditionModel takes"),
        ({"family": "flux", "train": narrow_text("flux")}, DataError, "rows of a size that FluxTransformer2DModel"),
        ({"report_to": "carrier_pigeon"}, ConfigError, "got 'carrier_pigeon': install its package"),
        ({"report_to": "aim"}, ConfigError, "got 'aim': install its package"),
        ({"lr_scheduler_type": "sideways"}, ConfigError, "expected a learning-rate schedule in"),
        ({"warmup_steps": 5}, ConfigError, "use constant_with_warmup"),
        ({"eval_batch_size": 0}, ConfigError, "eval_batch_size of at least 1"),
        ({"weight_decay": -1.0}, ConfigError, "weight_decay of at least 0"),
        ({"warmup_steps": -5}, ConfigError, "warmup_steps of at least 0"),
        ({"weight": "-3"}, ConfigError, "expected weight of at least 0"),
        ({"max_strength_factor": -1.0}, ConfigError, "max_strength_factor of at least 1"),
        ({"max_loss_factor": float("inf")}, ConfigError, "and finite"),
        ({"harmful_group_rows": 0}, ConfigError, "harmful_group_rows of at least 1"),
        ({"objective": ""}, ConfigError, r"objectives joined with '\+', got ''"),
        ({"family": "sd", "objective": "simulated_attack", "attacker_renamed": 0.5, "harmful": longer_text("sd")},
         DataError, "conditions of one shape for attacker_renamed"),
    ],
)
def test_what_cannot_be_is_refused_before_training(make_trainer, options, error, message):
    with pytest.raises(error, match=message):
        make_trainer(**options)


def test_deepspeed_from_the_launcher_is_refused(make_trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="no DeepSpeed, got it from accelerate's launcher.*Use DDP or FSDP2"):
        make_trainer()


def test_divergence_and_lack_of_memory_are_errors_that_name_the_knobs(make_trainer):
    with pytest.raises(TrainingDivergedError, match="lower the learning rate"):
        make_trainer(learning_rate=1e30, max_steps=6, max_grad_norm=0.0).train()

    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(DeviceMemoryError, match="model, optimizer and the cop"):
        patch.setattr("hf_immunize.training.core.simulated.SimulatedAttack.__init__", exhausted)
        make_trainer(objective="simulated_attack")
    for place in ("compute_gradients", "_measure_base", "optimizer.step"):
        trainer = make_trainer()
        whole, _, name = f"trainer.{place}".rpartition(".")
        setattr(trainer.optimizer if "optimizer" in whole else trainer, name, exhausted)
        with pytest.raises(DeviceMemoryError, match="per_device_train_batch_size.*gradient_checkpointing"):
            trainer.train()


@pytest.mark.parametrize(
    "options",
    [{"attacker_ceiling": -1.0}, {"min_snr_gamma": 0.0}, {"learning_rate": -1.0}, {"attacker_rank": -1},
     {"save_steps": -1}, {"save_total_limit": 0}],
    ids=lambda options: next(iter(options)),
)
def test_numbers_that_would_switch_something_off_unsaid_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        DiffusionImmunizationConfig("somewhere", **options)


def test_a_second_precision_in_one_process_is_a_typed_error(make_trainer):
    make_trainer()
    with pytest.raises(ConfigError, match="Use one setting per process"):
        make_trainer(mixed_precision="bf16")


def test_a_tracker_gets_the_options_and_every_log_entry(make_trainer):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, on_main_process

    told = {"log": {}}

    class Notebook(GeneralTracker):
        name, requires_logging_directory = "notebook", False

        def __init__(self, run_name, **_):
            super().__init__()
            told["run"] = run_name

        @property
        def tracker(self):
            return None

        @on_main_process
        def store_init_configuration(self, values):
            told["options"] = values

        @on_main_process
        def log(self, values, step, **_):
            told["log"][step] = values

        @on_main_process
        def finish(self):
            told["finished"] = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
        log = make_trainer(report_to="notebook", max_steps=2).train()
    assert told["run"] == "immunization" and told["options"]["max_steps"] == 2 and told["finished"]
    assert None not in told["options"].values()
    assert [{"step": step, **values} for step, values in told["log"].items()] == log and len(log) == 2


def test_every_family_is_saved_and_reloaded_as_an_ordinary_model(make_trainer, family, tmp_path):
    trainer = make_trainer(family, max_steps=1, sites="middle", objective="ill_only", trainable="lora", lora_rank=2)
    trainer.train()
    trainer.bare.save_pretrained(tmp_path / "saved")
    again = type(build_denoiser(family)).from_pretrained(tmp_path / "saved").eval()
    assert equal(weights(again), weights(trainer.bare)) and type(again) is type(trainer.bare)
    batch = build_examples(family, 3).batch(torch.arange(3))
    answers = [
        trainer.denoiser.call(model, batch.latents, torch.full((3,), 500), batch.conditions).detach()
        for model in (trainer.bare, again)
    ]
    assert units_apart(*answers) <= depth(again)
    changed = {name for name, value in build_denoiser(family).state_dict().items()
               if not torch.equal(value, weights(again)[name])}
    assert changed and not hasattr(trainer.bare, "peft_config")
    assert all(parameter.requires_grad for parameter in trainer.bare.parameters())


def test_operational_options_do_not_count_as_scientific():
    from hf_immunize.training.diffusion.config import scientific_options

    options = scientific_options(DiffusionImmunizationConfig("somewhere", save_steps=3))
    assert "strength" in options and not {"output_dir", "save_steps", "logging_steps"} & set(options)


def test_after_mixed_precision_the_model_in_memory_answers_as_the_saved_one(make_trainer, tmp_path):
    from accelerate.state import AcceleratorState
    from diffusers import UNet2DModel

    AcceleratorState._reset_state(reset_partial_state=True)  # another precision than that of the tests before
    try:
        trainer = make_trainer(mixed_precision="bf16", max_steps=1)
        trainer.train()
        trainer.bare.save_pretrained(tmp_path / "saved", safe_serialization=True)
        loaded = UNet2DModel.from_pretrained(tmp_path / "saved", use_safetensors=True)
        batch = trainer._batch(trainer.streams.retain, 0)
        with torch.no_grad():
            found, truth = (trainer._answer(model.eval(), batch) for model in (trainer.bare, loaded))
            with torch.autocast("cpu", torch.bfloat16):
                cast = trainer._answer(loaded, batch).float()
        assert units_apart(found, truth) <= depth(loaded) and units_apart(cast, truth) > 100 * depth(loaded)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_weights_in_half_precision_are_refused(make_trainer):
    with pytest.raises(ModelError, match="float32, got torch.bfloat16.*mixed_precision=bf16"):
        make_trainer(model=build_denoiser("unet").to(torch.bfloat16))


def test_a_checkpoint_that_is_being_rewritten_is_no_checkpoint(make_trainer, tmp_path, monkeypatch):
    from hf_immunize.errors import RecordError
    from hf_immunize.training.diffusion import trainer as module

    options = {"max_steps": 1, "save_steps": 1}
    make_trainer(**options).train()
    make_trainer(**options).train(tmp_path / "run" / "checkpoint-1")

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_loop", killed)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(**options).train()
    monkeypatch.undo()
    with pytest.raises(RecordError):
        make_trainer(**options).train(tmp_path / "run" / "checkpoint-1")


def test_evaluation_takes_no_more_rows_at_a_time_than_a_step_does(make_trainer):
    seen = []
    trainer = make_trainer(evaluation=build_examples("unet", 20, seed=3), max_steps=1, per_device_train_batch_size=5)
    call = trainer.denoiser.call

    def counted(model, noisy, *rest):
        seen.append(len(noisy))
        return call(model, noisy, *rest)

    trainer.denoiser = replace(trainer.denoiser, call=counted)
    trainer._points()
    assert seen and max(seen) == 5
    assert DiffusionImmunizationConfig("out", per_device_train_batch_size=3).eval_batch_size == 3
    assert DiffusionImmunizationConfig("out", eval_batch_size=7).eval_batch_size == 7
