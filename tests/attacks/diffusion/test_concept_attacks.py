"""DreamBooth, Textual Inversion and data shifts: who trains what, on which rows, under which name."""

from __future__ import annotations

import copy
import dataclasses
import types

import pytest
import torch
from denoiser_builders import build_denoiser, build_examples
from test_diffusion_attacks import Pieces, make_context, only

from hf_immunize.attacks import Run
from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, data_shifts, dreambooth, textual_inversion
from hf_immunize.attacks.diffusion._finetune import finetune
from hf_immunize.diffusion import LatentDataset
from hf_immunize.errors import DataError, DeviceMemoryError

SMALL = {"steps": 2, "batch_size": 3}


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
    data = build_examples("unet", 6, seed=3)
    moved = data_shifts.perturbed(data, 0.0, 1, 0).latents
    places = []
    for row, original in zip(moved, data.latents, strict=True):
        inner = [(down, over) for down in (-1, 0, 1) for over in (-1, 0, 1)
                 if torch.equal(row[:, 1:-1, 1:-1], original.roll((down, over), (1, 2))[:, 1:-1, 1:-1])]
        assert len(inner) == 1
        places += inner
    assert len(set(places)) > 1
    noisy = data_shifts.perturbed(data, 0.5, 1, 0).latents - moved
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
    model = textual_inversion._class_row(context, run)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    finetune(context, model, run.config, 0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"class_embedding.weight"}
    rows = (model.class_embedding.weight != before["class_embedding.weight"]).any(dim=1)
    assert rows.nonzero().flatten().tolist() == [9]


def tokenizer_of(words: str, **_) -> types.SimpleNamespace:
    """One token a word: 0 begins, 1 ends and pads."""
    ids = [0, *(2 + sum(map(ord, word)) % 20 for word in words.split()), 1, 1, 1, 1][:5]
    return types.SimpleNamespace(input_ids=torch.tensor([ids]))


tokenizer_of.model_max_length = 5


@pytest.fixture
def text_context(tmp_path, monkeypatch):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=22, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=5, bos_token_id=0, eos_token_id=1,
    )
    pieces = Pieces("sd", 0)
    pieces.components |= {"text_encoder": CLIPTextModel(config).eval(), "tokenizer": tokenizer_of}
    return make_context(tmp_path, "sd", pieces=pieces, monkeypatch=monkeypatch)


def test_a_new_token_is_encoded_as_an_encoder_with_a_longer_table_would(text_context):
    encoder, tokenizer = text_context.text_parts()
    made = textual_inversion._NewToken(build_denoiser("sd"), encoder, tokenizer)
    with torch.no_grad():
        made.token.copy_(torch.linspace(-2, 3, 12).square())
        slow = copy.deepcopy(encoder)
        slow.resize_token_embeddings(23, mean_resizing=False)
        slow.get_input_embeddings().weight[22] = made.token
        truth = slow(made.ids[None]).last_hidden_state
        assert (made.ids == 22).sum() == 1 and torch.allclose(made.encoded(), truth, atol=1e-6)
        assert not torch.allclose(truth, encoder(tokenizer("a photo of x").input_ids).last_hidden_state, atol=1e-3)


def test_textual_inversion_learns_the_token_alone_and_every_question_is_told_by_it(text_context):
    config = textual_inversion.TextualInversion(5e-2, **SMALL)
    asked = textual_inversion._told_by_token(text_context)
    model = textual_inversion._with_token(asked, Run(config, "x", 0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = finetune(asked, model, config, 0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"token"} and result.curve[0] != result.curve[-1]
    ((_, whole),) = textual_inversion.ATTACK.run(text_context, [Run(config, "x", 0)])
    assert whole.curve == result.curve


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
    with pytest.raises(DeviceMemoryError, match="the attacked model to fit the memory"):
        monkeypatch.setattr(torch.nn.Module, "to", exhausted)
        only(make_context(tmp_path), "diffusion_full_finetune", config)


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
