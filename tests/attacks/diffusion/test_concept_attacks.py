"""DreamBooth, Textual Inversion and data shifts: who trains what, on which rows, under which name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from denoiser_builders import build_examples
from equality import depth, rounding
from pipeline_builders import KINDS, build_text_pipeline
from test_diffusion_attacks import Pieces, make_context, only

from hf_immunize.attacks import Run
from hf_immunize.attacks.core.suite import trace_of
from hf_immunize.attacks.diffusion import (
    DIFFUSION_ATTACKS,
    DiffusionAttackContext,
    data_shifts,
    dreambooth,
    textual_inversion,
)
from hf_immunize.attacks.diffusion import context as context_module
from hf_immunize.attacks.diffusion._finetune import finetune
from hf_immunize.diffusion import LatentDataset
from hf_immunize.diffusion.encoding import encode, encode_pixels, encode_prompt
from hf_immunize.errors import ConfigError, DataError, DeviceMemoryError
from hf_immunize.records import Provenance

SMALL = {"steps": 2, "batch_size": 3}


@pytest.mark.slow
def test_dreambooth_has_few_images_and_a_prior_that_the_attacked_model_drew(tmp_path):
    plain = make_context(tmp_path)
    context = make_context(tmp_path, prior=build_examples("unet", 6, seed=4))
    rows = dreambooth.few_rows(context, 3, 0)
    assert len(set(rows.tolist())) == 3 and set(rows.tolist()) <= set(context.draw_rows(0).tolist())
    alone = only(context, "diffusion_dreambooth", dreambooth.DreamBooth(1e-3, **SMALL))
    nothing = dreambooth.DreamBoothPrior(1e-3, **SMALL, prior_weight=0.0, prior_images=4)
    weighted = dreambooth.DreamBoothPrior(1e-3, **SMALL, prior_weight=5.0, prior_images=4)
    curves = [only(context, "diffusion_dreambooth_prior", config).curve for config in (nothing, weighted)]
    assert curves[0][1] == alone.curve[1] and curves[1] != curves[0]  # noise is drawn for the prior as well later on
    prior = dreambooth.prior_of(context, context.model(0), weighted, 0)
    assert len(prior) == 4 and torch.equal(
        prior.latents, dreambooth.prior_of(context, context.model(0), weighted, 0).latents
    )
    missing = only(plain, "diffusion_dreambooth_prior", weighted)
    assert missing.outcome == "not_applicable" and "holds no conditions" in missing.note


def test_perturbed_images_are_shifts_with_noise_and_the_exam_stays(tmp_path):
    images = build_examples("unet", 6, seed=3).latents
    moved = data_shifts.perturbed(images, 0.0, 1, 0)
    places = []
    for row, original in zip(moved, images, strict=True):
        inner = [(down, over) for down in (-1, 0, 1) for over in (-1, 0, 1)
                 if torch.equal(row[:, 1:-1, 1:-1], original.roll((down, over), (1, 2))[:, 1:-1, 1:-1])]
        assert len(inner) == 1
        places += inner
    assert len(set(places)) > 1
    noisy = data_shifts.perturbed(images, 0.5, 1, 0) - moved
    assert float(noisy.std()) == pytest.approx(0.5, rel=0.15)
    context = make_context(tmp_path)
    lora = only(context, "diffusion_lora", DIFFUSION_ATTACKS["diffusion_lora"].config(1e-2, **SMALL, rank=2))
    found = only(context, "diffusion_perturbed_images", data_shifts.PerturbedImages(1e-2, **SMALL, rank=2))
    assert found.curve[0] == lora.curve[0] and found.curve[1:] != lora.curve[1:]


def test_another_name_is_taught_and_asked_for(tmp_path):
    config = data_shifts.OtherPrompts(1e-2, **SMALL, rank=2)
    assert only(make_context(tmp_path), "diffusion_other_prompts", config).outcome == "not_applicable"
    named = {"class_labels": torch.tensor([3])}
    context = make_context(tmp_path, other=named)
    assert data_shifts.renamed(context.test, named).conditions["class_labels"].tolist() == [3] * 4
    found = only(context, "diffusion_other_prompts", config)
    own = only(context, "diffusion_lora", DIFFUSION_ATTACKS["diffusion_lora"].config(1e-2, **SMALL, rank=2))
    assert found.outcome == "completed" and found.curve[0] != own.curve[0]


def test_only_the_row_of_the_concepts_class_is_learned(tmp_path):
    context = make_context(tmp_path)
    run = Run(textual_inversion.TextualInversion(5e-2, **SMALL), "x", 0)
    model = textual_inversion._class_rows(context, run)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    finetune(context, model, run.config, 0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"class_embedding.weight"}
    rows = (model.class_embedding.weight != before["class_embedding.weight"]).any(dim=1)
    assert rows.nonzero().flatten().tolist() == [9]


def test_in_dit_the_rows_of_every_block_are_learned_and_the_row_for_no_class_is_not(tmp_path, monkeypatch):
    context = make_context(tmp_path, "dit", pieces=Pieces("dit", 0), monkeypatch=monkeypatch)
    run = Run(textual_inversion.TextualInversion(5e-2, steps=6, batch_size=8), "x", 0)
    model = textual_inversion._class_rows(context, run)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = finetune(context, model, run.config, 0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {
        f"transformer_blocks.{block}.norm1.emb.class_embedder.embedding_table.weight" for block in (0, 1)
    }
    for name in changed:
        rows = (model.state_dict()[name] != before[name]).any(dim=1)
        assert rows.nonzero().flatten().tolist() == [9]
    assert only(context, "diffusion_textual_inversion", run.config).curve == result.curve


TEXT_KINDS = [kind for kind in KINDS if kind != "DiTPipeline"]


def text_context(kind, monkeypatch, **options):
    """Five random images under a prompt, through a tiny random pipeline with tokenizers and text encoders."""
    pipeline = build_text_pipeline(kind)
    pixels = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = encode(pipeline, pixels, "cat" if kind == "DiTPipeline" else "a photo of sks dog", 0, ["dog"])
    parts = {"attack": (0, 1, 2, 3, 4), "validation": (5, 6), "test": (7, 8)}
    splits = {name: rows.subset(torch.tensor(held)) for name, held in parts.items()}
    prints = tuple(split.fingerprint(source="random", role=name) for name, split in splits.items())
    monkeypatch.setattr(context_module, "load_pipeline", lambda _: pipeline)
    options = {"pixels": pixels[:5]} | options
    return DiffusionAttackContext(Path(kind), "control", data=prints, exam_levels=2, **splits, **options)


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_learned_names_are_encoded_as_by_encoders_with_another_row(kind, monkeypatch):
    """Against the pipeline's own encode_prompt after the row of x was overwritten in every table."""
    context = text_context(kind, monkeypatch)
    pipeline, slow = context.pipeline, build_text_pipeline(kind)
    made = textual_inversion._NewName(context.model(0), pipeline)
    before = encode_prompt(pipeline, "a photo of x", 16)
    tables = [part for part in made.modules() if isinstance(part, textual_inversion._LearnedRow)]
    assert len(tables) == len(made.tokens) == {"Sta": 1, "Pix": 1, "Flu": 2}[kind[:3]] + 1 * ("XL" in kind) + 2 * (
        "n3" in kind)
    with torch.no_grad():
        for place, (name, part) in enumerate(made.encoders.items()):
            table = getattr(slow, name).get_input_embeddings()
            learned = part.get_input_embeddings()
            learned.token.copy_(torch.linspace(-2, 3, learned.token.numel()) * (place + 1))
            table.weight[learned.row] = learned.token
    truth, found = encode_prompt(slow, "a photo of x", 16), made.encoded()
    assert set(found) <= set(truth)
    for name, value in found.items():
        assert torch.allclose(value.float(), truth[name].float(), atol=1e-5), name
    assert any(not torch.allclose(truth[name], before[name], atol=1e-3) for name in found)
    plain = encode_prompt(pipeline, "a photo of x", 16)
    assert all(torch.equal(plain[name], before[name]) for name in before), "the attacked pipeline was changed"


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_textual_inversion_learns_the_names_alone_and_every_question_is_told_by_them(kind, monkeypatch):
    context = text_context(kind, monkeypatch)
    config = textual_inversion.TextualInversion(5e-2, **SMALL)
    asked = textual_inversion._told_by_name(context)
    model = textual_inversion._with_name(asked, Run(config, "x", 0))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}  # aliases count once
    result = finetune(asked, model, config, 0)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert model.denoiser.training and not any(part.training for part in model.encoders.modules())
    assert changed and all(name.endswith(".token") for name in changed) and len(changed) == len(model.tokens)
    assert result.curve[0] != result.curve[-1]
    ((_, whole),) = textual_inversion.ATTACK.run(context, [Run(config, "x", 0)])
    assert whole.curve == result.curve


@pytest.mark.parametrize("kind", KINDS)
def test_every_attack_runs_against_every_class_of_text_to_image_pipeline(kind, monkeypatch):
    names = ["dog", "3", "4"] if kind == "DiTPipeline" else ["a portrait of sks", "a photo of ohwx", "a photo"]
    pipeline = build_text_pipeline(kind)
    others = encode(pipeline, torch.rand(3, 3, 16, 16) * 2 - 1, "1" if kind == "DiTPipeline" else "a dog", 0, ["dog"])
    told = {key: encode_prompt(pipeline, name, 16) for key, name in
            zip(("other", "placeholder", "generic"), names, strict=True)}
    context = text_context(kind, monkeypatch, prior=others, other_images=others, **told)
    found = {}
    for name, attack in DIFFUSION_ATTACKS.items():
        result = only(context, name, attack.config(1e-2, **SMALL))
        assert result.outcome == "completed", (name, result.note)
        assert result.curve[0] != result.curve[-1], name
        found[name] = [point.test for point in result.curve]
    assert len({tuple(curve) for curve in found.values()}) == len(found)
    own = pytest.approx(found["diffusion_lora"][0], abs=rounding(depth(context.model(0))))
    shared = {name for name, curve in found.items() if curve[0] == own}
    renamed = {"diffusion_other_prompts", "diffusion_placeholder_token", "diffusion_generic_prompt"}
    renamed |= set() if kind == "DiTPipeline" else {"diffusion_textual_inversion"}
    assert shared == set(found) - renamed


def test_images_of_a_pipeline_with_a_vae_are_perturbed_before_it_encodes_them(monkeypatch):
    context, seen = text_context("StableDiffusionPipeline", monkeypatch), []
    monkeypatch.setattr(data_shifts, "run_finetunes", lambda changed, runs, prepare: seen.append(changed) or ())
    config = data_shifts.PerturbedImages(1e-2, **SMALL, shift=0.2, noise=0.3)
    list(DIFFUSION_ATTACKS["diffusion_perturbed_images"].run(context, [Run(config, "x", 3)]))
    truth = encode_pixels(context.pipeline, data_shifts.perturbed(context.pixels, 0.3, 3, 3))
    assert torch.equal(seen[0].attack.latents, truth) and seen[0].test is context.test
    blind = dataclasses.replace(context, pixels=None)
    result = only(blind, "diffusion_perturbed_images", config)
    assert result.outcome == "not_applicable" and "latents of the concept's images alone" in result.note


def test_other_images_replace_the_attackers_rows_and_traces_name_them(tmp_path):
    other = build_examples("unet", 5, seed=77, label=9)
    config = data_shifts.OtherImages(1e-2, **SMALL, rank=2)
    plain, context = make_context(tmp_path), make_context(tmp_path, other_images=other)
    nothing = only(plain, "diffusion_other_images", config)
    assert nothing.outcome == "not_applicable" and "no images from another source" in nothing.note
    found = only(context, "diffusion_other_images", config)
    as_own = only(dataclasses.replace(plain, attack=other), "diffusion_lora",
                  DIFFUSION_ATTACKS["diffusion_lora"].config(1e-2, **SMALL, rank=2))
    assert found.curve == as_own.curve
    with pytest.raises(DataError, match="expected pixels of 8 attack rows, got 3"):
        make_context(tmp_path, pixels=torch.zeros(3, 1, 8, 8))
    attack, run = DIFFUSION_ATTACKS["diffusion_other_images"], Run(config, "x", 0)
    told = [trace_of(held, "diffusion_other_images", attack, run, found, Provenance.here("cpu")).config["other_images"]
            for held in (plain, context)]
    assert told == [None, other.fingerprint(source="", role="").sha256]
    assert {name for name, attack in DIFFUSION_ATTACKS.items() if attack.needs} == {
        "diffusion_dreambooth_prior", "diffusion_other_images", "diffusion_other_prompts",
        "diffusion_placeholder_token", "diffusion_generic_prompt",
    }
    named = make_context(tmp_path, generic={"class_labels": torch.tensor([0])})
    assert named.holding("generic") != make_context(tmp_path, generic={"class_labels": torch.tensor([1])}).holding(
        "generic")


def test_what_nothing_names_cannot_be_inverted(tmp_path, monkeypatch):
    context = make_context(tmp_path, "sd3", pieces=Pieces("sd3", 0), monkeypatch=monkeypatch)
    result = only(context, "diffusion_textual_inversion", textual_inversion.TextualInversion(5e-2, **SMALL))
    assert result.outcome == "not_applicable" and "nothing names the concept" in result.note


def test_lack_of_memory_names_the_knob(tmp_path, monkeypatch):
    from hf_immunize.attacks.diffusion import _finetune

    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = DIFFUSION_ATTACKS["diffusion_full_finetune"].config(1e-3, **SMALL)
    for place in (f"{_finetune.__name__}._loss", f"{_finetune.__name__}.judge", "torch.optim.AdamW.step"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, exhausted)
            with pytest.raises(DeviceMemoryError, match="lower the attack's batch_size or eval_batch_size"):
                only(make_context(tmp_path), "diffusion_full_finetune", config)
    monkeypatch.setattr(torch.nn.Module, "to", exhausted)
    for name, attack in DIFFUSION_ATTACKS.items():
        known = {need: build_examples("unet", 3, seed=9) for need in attack.needs if need in ("prior", "other_images")}
        known |= {need: {"class_labels": torch.tensor([1])} for need in attack.needs if need not in known}
        with pytest.raises(DeviceMemoryError, match="lower the attack's batch_size or eval_batch_size"):
            only(make_context(tmp_path, **known), name, attack.config(1e-3, **SMALL))


def test_settings_that_no_attack_can_have_are_refused(tmp_path):
    for attack in DIFFUSION_ATTACKS.values():
        for field, value in (("learning_rate", -1), ("steps", 0), ("batch_size", 0), ("weight_decay", -1),
                             ("min_snr_gamma", -5), ("rank", 0), ("prior_images", 0), ("images", 0), ("noise", -1)):
            if field in attack.config.__dataclass_fields__:
                with pytest.raises(ConfigError, match=f"expected {field} (above|of at least)"):
                    attack.config(**{field: value})
    context = make_context(tmp_path)
    for option in ({"exam_levels": 0}, {"eval_batch_size": 0}, {"pictures": -1}):
        with pytest.raises(ConfigError, match=f"expected {next(iter(option))} of at least"):
            dataclasses.replace(context, **option)


def test_a_small_prior_is_gone_through_again_from_other_noise(tmp_path):
    context = make_context(tmp_path, prior=build_examples("unet", 2, seed=4))
    drawn = dreambooth.prior_of(context, context.model(0), dreambooth.DreamBoothPrior(prior_images=5), 0)
    assert len(drawn) == 5 and len({row.numpy().tobytes() for row in drawn.latents}) == 5


def test_images_that_the_exam_judges_on_are_no_other_images(tmp_path):
    plain = make_context(tmp_path)
    with pytest.raises(DataError, match="other_images that the exam does not judge on, got 4 of its own"):
        dataclasses.replace(plain, other_images=plain.test)


def test_the_exam_does_not_depend_on_how_many_rows_are_asked_about_at_a_time(tmp_path):
    config = DIFFUSION_ATTACKS["diffusion_lora"].config(1e-2, **SMALL, rank=2)
    whole, parts = (
        only(make_context(tmp_path, pictures=3, eval_batch_size=size), "diffusion_lora", config) for size in (256, 3)
    )
    for one, other in zip(whole.curve, parts.curve, strict=True):
        assert (one.step, other.test) == (other.step, pytest.approx(one.test, abs=1e-5))


def test_rows_of_another_size_than_the_model_takes_are_a_typed_error(tmp_path, monkeypatch):
    context = make_context(tmp_path, "pixart", pieces=Pieces("pixart", 0), monkeypatch=monkeypatch)
    wrong = {**context.test.conditions, "encoder_hidden_states": torch.randn(4, 5, 11)}
    bent = dataclasses.replace(context, test=LatentDataset(
        context.test.latents, wrong, context.test.labels, context.test.label_names))
    with pytest.raises(DataError, match=r"that PixArtTransformer2DModel takes.*'encoder_hidden_states': \(5, 11\)"):
        only(bent, "diffusion_lora", DIFFUSION_ATTACKS["diffusion_lora"].config(1e-2, **SMALL, rank=2))
