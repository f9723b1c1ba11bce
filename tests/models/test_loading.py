"""Whatever is stored, what is loaded has float32 weights that are numbers; what is no whole model is refused with what
to do about it."""

from __future__ import annotations

import json

import pytest
import torch
from denoiser_builders import build_denoiser
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTForImageClassification,
)
from vision_builders import build_classifier

from hf_immunize.errors import ModelError
from hf_immunize.features import add_head
from hf_immunize.models import (
    label_maps,
    load_classifier,
    load_processor,
    random_classifier,
    refuse_below_float32,
    refuse_folder,
    variant_of,
)


@pytest.mark.parametrize("name", ["vit", "swiftformer", "mobilenet_v2"])
def test_a_head_for_other_classes_is_drawn_anew_also_where_there_are_as_many(tmp_path, name):
    """By names: those of the model itself, in its own order, keep what was trained."""
    saved = build_classifier(name)
    saved.config.id2label = {0: "cat", 1: "dog", 2: "pig"}
    saved.save_pretrained(tmp_path)
    heads = [key for key, value in saved.state_dict().items() if value.dim() == 2 and len(value) == 3]
    assert heads

    def changed(*names):
        held = load_classifier(tmp_path, labels=label_maps(names)).state_dict()
        return {key for key, value in saved.state_dict().items() if not torch.equal(value, held[key])}

    assert changed("cat", "dog", "pig") == set()
    for names in (("dog", "cat", "pig"), ("bus", "car", "van")):
        found = changed(*names)
        assert set(heads) <= found and all(key.rpartition(".")[0] in {h.rpartition(".")[0] for h in heads}
                                           for key in found)


def test_a_head_of_a_class_that_is_not_made_of_its_config_is_drawn_as_any_linear_layer(tmp_path, monkeypatch):
    saved = build_classifier("vit")
    saved.config.id2label = {0: "cat", 1: "dog", 2: "pig"}
    saved.save_pretrained(tmp_path)
    made, stock = [], ViTForImageClassification.__init__

    def once(self, config, *args, **kwargs):
        made.append(config)
        if len(made) > 1:
            raise ImportError("no such library")
        stock(self, config, *args, **kwargs)

    monkeypatch.setattr(ViTForImageClassification, "__init__", once)
    held = load_classifier(tmp_path, labels=label_maps(["bus", "car", "van"])).state_dict()
    changed = {key for key, value in saved.state_dict().items() if not torch.equal(value, held[key])}
    assert len(made) == 2 and changed == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_float32_and_those_that_are_stored(make_vit, tmp_path, stored):
    saved = make_vit().to(stored)
    saved.save_pretrained(tmp_path)
    assert AutoModelForImageClassification.from_pretrained(tmp_path).dtype == stored  # what transformers gives
    model = load_classifier(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    kept = saved.state_dict()
    assert all(torch.equal(value, kept[name].float()) for name, value in model.state_dict().items())


def test_a_backbone_stored_in_half_under_a_float32_head_loses_nothing(make_vit, tmp_path):
    make_vit().vit.half().save_pretrained(tmp_path / "backbone")
    headed = add_head(AutoModel.from_pretrained(tmp_path / "backbone"), 3).float()
    with torch.no_grad():
        headed.backbone.layernorm.weight += 1e-6  # less than float16 can say
    headed.save_pretrained(tmp_path / "headed")
    found = load_classifier(tmp_path / "headed")
    assert torch.equal(found.backbone.layernorm.weight, headed.backbone.layernorm.weight)


def test_random_weights_of_a_half_precision_architecture_are_float32(make_vit, tmp_path):
    make_vit().half().save_pretrained(tmp_path)
    assert random_classifier(tmp_path, 0).dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tensor", ["classifier.weight", "running_var"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, tensor, value):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=3, layer_type="basic")
    model = ResNetForImageClassification(config)
    (name,) = [name for name in model.state_dict() if name.endswith(tensor)][:1] or ["classifier.1.weight"]
    model.state_dict()[name].view(-1)[-1] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"got NaN or infinity in 1 of \d+ tensors \({name}\): restore the weights"):
        load_classifier(tmp_path)


def test_a_half_precision_model_is_refused_where_it_would_be_trained(make_vit):
    model = make_vit().to(torch.bfloat16)
    with pytest.raises(ModelError, match=r"in float32, got bfloat16 .* dtype=torch.float32\) and set bf16=True"):
        refuse_below_float32(model, "the model")
    refuse_below_float32(model.requires_grad_(False), "the model")  # nothing is trained


def test_an_adapter_is_refused_and_what_the_message_says_works(make_vit, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    make_vit().save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    pixels = torch.randn(2, 3, 8, 8)
    wanted = adapted.eval()(pixel_values=pixels).logits
    with pytest.raises(ModelError, match=r"got a PEFT adapter of .*base: merge it first, .*merge_and_unload\(\)"):
        load_classifier(tmp_path / "adapter")
    fresh = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    merged = PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.allclose(load_classifier(tmp_path / "merged").eval()(pixel_values=pixels).logits, wanted, atol=1e-5)


def test_weights_in_one_variant_alone_are_found(make_vit, tmp_path):
    saved = make_vit().half()
    saved.save_pretrained(tmp_path, variant="fp16")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.fp16.safetensors"]
    found = load_classifier(tmp_path)
    assert torch.equal(found.classifier.weight, saved.classifier.weight.float())
    (tmp_path / "model.fp16.safetensors").rename(tmp_path / "model.bf16.safetensors")
    assert variant_of(tmp_path) == "bf16"
    saved.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ModelError, match=r"got variants \['bf16', 'fp16'\] and no plain one"):
        load_classifier(tmp_path)
    saved.save_pretrained(tmp_path)
    assert variant_of(tmp_path) is None


def test_a_single_file_says_how_to_convert_it(make_vit, tmp_path):
    save_file({"weight": torch.ones(1)}, tmp_path / "all.safetensors")
    for source in (tmp_path / "all.safetensors", tmp_path):
        with pytest.raises(ModelError, match=r"got the single file 'all.safetensors': convert it .*from_single_file"):
            load_classifier(source)
    with pytest.raises(ModelError, match="got 'mistyped.ckpt', which is not there"):
        refuse_folder(tmp_path / "mistyped.ckpt")


@pytest.mark.parametrize("source,told", [
    ("no/where/at all", r"expected the folder of a model, or an id on the Hub .*: there is no such folder. Check the"),
    ("/nowhere", "there is no such folder"),
    ("mistyped", "an image processor in mistyped, got no such folder here, and from the Hub OSError: "),
])  # fmt: skip
def test_a_model_that_is_not_there_is_not_told_to_be_a_repository(monkeypatch, tmp_path, source, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", refuse_everything)
    with pytest.raises(ModelError, match=told):
        load_processor(source)


def refuse_everything(*_, **__):
    raise OSError("Repo id must be in the form 'repo_name' or 'namespace/repo_name'")


def test_pickles_and_quantized_weights_are_refused_by_what_they_are(make_vit, tmp_path):
    model = make_vit()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(ModelError, match="quantized by bitsandbytes"):
        load_classifier(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    load_classifier(tmp_path)  # beside safetensors a pickle is left alone
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="got pytorch_model.bin, a pickle, which can run code"):
        load_classifier(tmp_path)


def test_a_backbone_without_its_head_is_not_given_a_random_one(make_vit, tmp_path):
    make_vit().vit.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"got none for \['classifier.bias', 'classifier.weight'\].*add_head"):
        load_classifier(tmp_path)
    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    assert load_classifier(tmp_path, labels=labels).classifier.out_features == 2


def pipeline_of(tmp_path, **saving):
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(build_denoiser("unet"), DDPMScheduler()).save_pretrained(tmp_path, **saving)
    return tmp_path


def test_pipelines_come_in_float32_from_any_variant_and_never_with_nan(tmp_path):
    from hf_immunize.diffusion import load_pipeline

    folder = pipeline_of(tmp_path, variant="fp16")
    assert list(folder.glob("unet/*.safetensors"))[0].name == "diffusion_pytorch_model.fp16.safetensors"
    assert load_pipeline(folder).unet.dtype == torch.float32
    file = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    weights = load_file(file)
    halved = {name: value.half() for name, value in weights.items()}
    save_file(halved, file)
    found = load_pipeline(folder).unet
    assert found.dtype == torch.float32
    assert all(torch.equal(value, halved[name].float()) for name, value in found.state_dict().items())
    base = load_pipeline(folder, denoiser_dtype=torch.bfloat16).unet  # frozen beside LoRA factors
    assert all(torch.equal(value, halved[name].bfloat16()) for name, value in base.state_dict().items())
    next(iter(halved.values())).view(-1)[0] = float("nan")
    save_file(halved, file)
    with pytest.raises(ModelError, match="expected finite weights in unet of .*, got NaN or infinity in 1 of"):
        load_pipeline(folder)
    with pytest.raises(ModelError, match="from_single_file"):
        load_pipeline(file)


def test_modules_without_any_tensor_are_finite():
    from hf_immunize.models import refuse_non_finite

    refuse_non_finite(nn.Identity(), "nothing")


def test_a_processor_for_colour_is_brought_to_a_model_of_one_channel(tmp_path):
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    from hf_immunize.models import load_processor

    tiny = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16}
    ViTForImageClassification(ViTConfig(num_channels=1, **tiny)).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)  # three means, as by default
    found = load_processor(tmp_path)
    pixels = found([Image.new("L", (8, 8), 255)], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 1, 8, 8) and torch.allclose(pixels, torch.ones(1))
    assert load_classifier(tmp_path)(pixel_values=pixels).logits.shape == (1, 2)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"expected image_mean of 1 numbers .* got \[0.4, 0.5, 0.6\]"):
        load_processor(tmp_path)


def test_a_file_where_a_model_is_named_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    from hf_immunize.hub import local_folder

    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="got the single file 'model.safetensors': convert it"):
        local_folder("model.safetensors")
    with pytest.raises(ModelError, match="got 'sd15.safetensors', which is not there"):
        local_folder("sd15.safetensors")


def test_a_judge_of_likeness_is_float32_and_finite(make_vit, tmp_path):
    from transformers import ViTImageProcessorPil

    from hf_immunize.certification.similarity import ImageFeatures

    backbone = make_vit().vit.half()
    backbone.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    assert ImageFeatures.of(tmp_path).model.dtype == torch.float32
    backbone.layernorm.weight.data[0] = float("nan")
    backbone.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="expected finite weights"):
        ImageFeatures.of(tmp_path)
