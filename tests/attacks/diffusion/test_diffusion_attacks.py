"""Attacks on saved pipelines: every family, paired draws, controls, resumable suites."""

from __future__ import annotations

import diffusers
import pytest
import torch
from denoiser_builders import FAMILIES, build_denoiser, build_examples, build_scheduler
from equality import depth, rounding

from hf_immunize.attacks import Run, run_suite
from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, METRIC, DiffusionAttackContext
from hf_immunize.attacks.diffusion import context as module
from hf_immunize.attacks.diffusion._finetune import judge
from hf_immunize.attacks.diffusion.full_finetune import DiffusionFullFinetune
from hf_immunize.attacks.diffusion.lora import DiffusionLora, adapted
from hf_immunize.errors import DataError
from hf_immunize.exam.means import Means
from hf_immunize.metrics import steps_to_threshold
from hf_immunize.records import AttackTrace


class Pieces:
    """Stands for a pipeline of any family: a scheduler and a denoiser."""

    def __init__(self, family, seed):
        self.scheduler = build_scheduler(family)
        name = "unet" if "UNet" in FAMILIES[family][0] else "transformer"
        self.components = {name: build_denoiser(family, seed), "scheduler": self.scheduler}
        setattr(self, name, self.components[name])


def make_context(tmp_path, family="unet", role="control", seed=0, pieces=None, monkeypatch=None, **options):
    folder = tmp_path / f"{family}-{seed}"
    if pieces is not None:
        monkeypatch.setattr(module, "load_pipeline", lambda _: pieces)
    elif not folder.exists():
        made = diffusers.ConsistencyModelPipeline(build_denoiser(family, seed), build_scheduler(family))
        made.save_pretrained(folder)
    splits = {
        name: build_examples(family, rows, seed=place + 10, label=9)
        for place, (name, rows) in enumerate((("attack", 8), ("validation", 4), ("test", 4)))
    }
    prints = tuple(split.fingerprint(source="random", role=f"harmful {name}") for name, split in splits.items())
    return DiffusionAttackContext(folder, role, data=prints, exam_levels=2, **splits, **options)


def only(context, name, config, seed=0):
    attack = DIFFUSION_ATTACKS[name]
    ((_, result),) = attack.run(context, [Run(config, "x", seed)])
    assert result.outcome != "not_applicable" or attack.refuses or attack.needs, f"{name} refused {result.note}, unsaid"
    return result


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_attacked_three_steps(tmp_path, monkeypatch, family):
    context = make_context(tmp_path, family, pieces=Pieces(family, 0), monkeypatch=monkeypatch)
    for name, config in (
        ("diffusion_lora", DiffusionLora(1e-2, steps=3, batch_size=4, rank=2)),
        ("diffusion_full_finetune", DiffusionFullFinetune(1e-3, steps=3, batch_size=4)),
    ):
        result = only(context, name, config)
        assert result.outcome == "completed" and [point.step for point in result.curve] == [0, 1, 2, 3]
        # LoRA begins as nothing, but what is frozen and what is trained take other paths through the same product
        start, plain = result.curve[0], judge(context, context.model(0), 0)
        for found, truth in ((start.validation, plain.validation), (start.test, plain.test)):
            assert found == pytest.approx(truth, abs=rounding(depth(context.model(0))))
        assert result.curve[-1].test != result.curve[0].test


def test_full_fine_tuning_learns_and_the_saved_weights_stay(tmp_path):
    context = make_context(tmp_path)
    before = {name: value.clone() for name, value in context.model(0).state_dict().items()}
    result = only(context, "diffusion_full_finetune", DiffusionFullFinetune(1e-2, steps=15, batch_size=8))
    assert result.curve[-1].test > result.curve[0].test + 0.05
    assert all(torch.equal(value, before[name]) for name, value in context.model(0).state_dict().items())


def test_lora_trains_adapters_on_attention_alone_and_seeds_pair_models(tmp_path):
    first, second = make_context(tmp_path), make_context(tmp_path, role="subject", seed=1)
    runs = [Run(DiffusionLora(rank=2), "x", seed) for seed in (0, 1)]
    made = {(context.role, run.seed): adapted(context, run) for context in (first, second) for run in runs}
    trained = {n: p for n, p in made["control", 0].named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and ".to_" in name for name in trained)
    other = dict(made["subject", 0].named_parameters())
    assert all(torch.equal(value, other[name]) for name, value in trained.items())
    another = dict(made["control", 1].named_parameters())
    assert any(not torch.equal(value, another[name]) for name, value in trained.items())


def test_divergence_is_a_failed_try_and_scratch_is_another_model_for_every_seed(tmp_path):
    context = make_context(tmp_path, role="scratch")
    result = only(context, "diffusion_full_finetune", DiffusionFullFinetune(1e25, steps=5, batch_size=4))
    assert result.outcome == "diverged" and "not finite" in result.note
    draws = [context.model(seed).state_dict()["conv_in.weight"] for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert context.fingerprint.weights == {}


def test_a_suite_leaves_traces_that_say_what_was_measured_and_resumes(tmp_path):
    settings = {"diffusion_lora": {"steps": (2,), "learning_rate": (1e-3, 1e-2), "batch_size": (4,), "rank": (2,)}}

    def sit():
        context, names = make_context(tmp_path), ["diffusion_lora"]
        return run_suite(context, DIFFUSION_ATTACKS, names, (0, 1), tmp_path / "out", settings)

    first = sit()
    assert (first.made, first.kept) == (4, 0)
    paths = sorted((tmp_path / "out/traces/control").iterdir())
    traces = [AttackTrace.read(path) for path in paths]
    assert {trace.config["metric"] for trace in traces} == {METRIC}
    assert {trace.model.architecture for trace in traces} == {"UNet2DModel"}
    assert steps_to_threshold(traces[0], traces[0].curve[0].test - 1).steps == 0
    paths[1].unlink()
    again = sit()
    assert (again.made, again.kept) == (1, 3) and AttackTrace.read(paths[1]).curve == traces[1].curve


def test_one_split_twice_is_refused(tmp_path):
    good = make_context(tmp_path)
    with pytest.raises(DataError, match="one split twice"):
        DiffusionAttackContext(
            good.folder, "control", good.attack, good.test, good.test, (*good.data[:2], good.data[1])
        )


@pytest.mark.parametrize("means", [Means(micro_batch_size=3), Means(gradient_checkpointing=True)])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(tmp_path, means):
    config = DiffusionFullFinetune(1e-3, steps=3, batch_size=4)
    whole, parts = (only(make_context(tmp_path, means=told), "diffusion_full_finetune", config)
                    for told in (Means(), means))
    assert [point.test for point in parts.curve] == pytest.approx([point.test for point in whole.curve], abs=1e-5)
    assert parts.note is None


def test_who_runs_out_of_memory_goes_on_in_smaller_parts(tmp_path, monkeypatch):
    config = DiffusionFullFinetune(1e-3, steps=3, batch_size=4)
    whole = only(make_context(tmp_path), "diffusion_full_finetune", config)
    forward = diffusers.UNet2DModel.forward

    def scarce(self, sample, *rest, **options):
        if torch.is_grad_enabled() and len(sample) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, sample, *rest, **options)

    monkeypatch.setattr(diffusers.UNet2DModel, "forward", scarce)
    found = only(make_context(tmp_path), "diffusion_full_finetune", config)
    assert found.note == "memory ran out: steps in parts of 2 images"
    assert [point.test for point in found.curve] == pytest.approx([point.test for point in whole.curve], abs=1e-5)


def test_bfloat16_is_told_in_the_trace(tmp_path):
    context = make_context(tmp_path, means=Means("bf16"))
    result = only(context, "diffusion_full_finetune", DiffusionFullFinetune(1e-3, steps=2, batch_size=4))
    assert result.outcome == "completed" and context.described["precision"] == "bf16"
