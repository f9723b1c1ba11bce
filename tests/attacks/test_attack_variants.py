"""The wider suite: other optimizers, adapters, structural and data attackers."""

import numpy as np
import pytest
import torch
from test_attack_finetune import only
from test_attack_probes import as_tuples, one_by_one
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_immunize.attacks import ATTACKS, Run, plan_runs
from hf_immunize.attacks import _finetune as engine
from hf_immunize.attacks.vision import _optimizers as optimizers
from hf_immunize.attacks.vision._blocks import block_sites, find_trunk, last_blocks
from hf_immunize.attacks.vision._preparations import last_part as prepare_partial
from hf_immunize.attacks.vision._preparations import reset_last as prepare_reset
from hf_immunize.attacks.vision._preparations import ridge_head
from hf_immunize.attacks.vision._rows import training_rows as rows_of
from hf_immunize.attacks.vision.batchnorm_probe import BatchNormProbe, reestimate
from hf_immunize.attacks.vision.earlier_layer_probe import EarlierLayerProbe
from hf_immunize.attacks.vision.lora import Lora
from hf_immunize.errors import ConfigError, ModelError

FewShotFinetune, LinearProbeMomentum, NoisyFinetune, PartialFinetune, ResetLastBlocks = (
    ATTACKS[name].config for name in (
        "few_shot_finetune", "linear_probe_momentum", "noisy_finetune", "partial_finetune", "reset_last_blocks",
    )
)  # fmt: skip
ADAPTERS = ["lora", "dora", "loha", "lokr", "oft", "ia3", "vera"]


@pytest.fixture
def resnet_context(make_context):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=2, layer_type="basic")
    return make_context(labels=2, seed=7, model=ResNetForImageClassification(config))


def test_momentum_equals_torch(make_context):
    context, config = make_context(), LinearProbeMomentum(learning_rate=1.0, steps=40)

    def nesterov(parameters, lr):
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True)

    found = only(context, "linear_probe_momentum", config)
    assert np.array(as_tuples(found.curve)) == pytest.approx(np.array(one_by_one(context, 0, config, nesterov)))


def test_lbfgs_finds_the_minimum_that_scikit_learn_finds(make_context):
    from sklearn.linear_model import LogisticRegression

    from hf_immunize.attacks.vision.lbfgs_probe import LbfgsProbe
    from hf_immunize.linalg.whitening import fit_feature_map

    context = make_context()
    found = only(context, "lbfgs_probe", LbfgsProbe(weight_decay=1e-2, steps=100))
    rows, features = context.draw_rows(0), context.features(0)
    mapped = fit_feature_map(features["attack"][rows], "centered")
    reference = LogisticRegression(C=1 / (1e-2 * len(rows)), tol=1e-10, max_iter=5000)
    reference.fit(mapped(features["attack"][rows]).numpy(), context.attack.labels[rows].numpy())
    guess = torch.as_tensor(reference.predict(mapped(features["test"]).numpy()))
    assert found.curve[-1].test == pytest.approx((guess == context.test.labels).double().mean().item())


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_train_little_beside_the_head(make_context, name):
    seen = {}
    plain = engine.finetune

    def spy(context, model, config, seed, before, bars=()):
        seen["trained"] = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
        seen["whole"] = len(list(model.parameters()))
        return plain(context, model, config, seed, before, bars)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "finetune", spy)
        result = only(make_context(), name, ATTACKS[name].config(1e-2, steps=2))
    assert result.outcome == "completed", result.note
    adapters = {n for n in seen["trained"] if ".classifier." not in n}
    assert adapters and len(seen["trained"]) - len(adapters) == 2
    assert all(".q_proj." in n or ".v_proj." in n or "vera" in n for n in adapters)


def test_what_an_adapter_cannot_target_is_not_applicable(resnet_context):
    result = only(resnet_context, "vera", ATTACKS["vera"].config(1e-2, steps=2))
    assert result.outcome == "not_applicable" and "PEFT cannot put this adapter on Conv2d layers" in result.note


# PEFT has no VeRA for convolutions, and its OFT does not pad: no 3 x 3 kernel fits the 2 x 2 maps of this network.
@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in ("vera", "oft")])
def test_adapters_train_convolutions_that_lie_channels_last(resnet_context, name):
    layers = [module for module in resnet_context.model(0).modules() if isinstance(module, nn.Conv2d)]
    assert any(layer.weight.shape[-1] > 1 and not layer.weight.is_contiguous() for layer in layers)
    result = only(resnet_context, name, ATTACKS[name].config(1e-2, steps=2))
    assert result.outcome == "completed", result.note


@pytest.mark.parametrize("variant", ["rslora", "pissa", "dora"])
def test_lora_variants(make_context, variant):
    results = [only(make_context(), "lora", Lora(1e-2, steps=4, variant=name)) for name in ("plain", variant)]
    assert all(result.outcome == "completed" for result in results)
    with pytest.raises(ConfigError, match="expected a LoRA variant in .*got 'qlora'"):
        Lora(variant="qlora")


def test_the_trunk_is_found_and_its_outputs_are_sites(make_vit, resnet_context):
    vit = make_vit(layers=3)
    assert find_trunk(vit)[0] == "vit.layers"
    assert block_sites(vit, "classifier") == ["vit.layers.1", "vit.layers.2", "vit.layernorm"]
    assert len(last_blocks(vit, 0.01)) == 1 + 2 and len(last_blocks(vit, 1.0)) == 3 + 2
    assert find_trunk(resnet_context.model(0))[0] == "resnet.encoder.stages"
    with pytest.raises(ModelError, match="expected a list of blocks in Linear, got none"):
        find_trunk(nn.Linear(2, 2))


def test_earlier_layers_are_the_outputs_of_the_blocks(make_context):
    from hf_immunize.attacks.vision.ridge_probe import RidgeProbe

    context = make_context()
    model = context.model(0).eval()
    outputs = {}
    for index, layer in enumerate(model.vit.layers):
        layer.register_forward_hook(lambda _, __, out, index=index: outputs.setdefault(index, []).append(out))
    by_hand = context.features_of(model, "vit.layernorm")
    last = torch.cat(outputs[1][:1]).mean(dim=1)
    assert torch.allclose(by_hand["attack"], last, atol=1e-6)
    found = only(context, "earlier_layer_probe", EarlierLayerProbe(depth=1.0, penalty=1e-3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(context._features, (None, "classifier"), by_hand)
        wanted = only(context, "ridge_probe", RidgeProbe(penalty=1e-3, features="standardized"))
    assert as_tuples(found.curve) == as_tuples(wanted.curve)


def test_a_model_without_blocks_has_no_earlier_layers(make_context, monkeypatch):
    import hf_immunize.attacks.vision.earlier_layer_probe as probe

    def nothing(model, head):
        raise ModelError("expected a list of blocks")

    monkeypatch.setattr(probe, "block_sites", nothing)
    assert only(make_context(), "earlier_layer_probe", EarlierLayerProbe()).outcome == "not_applicable"


def test_batch_norm_statistics_become_those_of_the_attackers_rows(resnet_context, make_context):
    context = resnet_context
    model = reestimate(context.model(0), context, 3)
    first = context.model(0).resnet.embedder.embedder
    with torch.no_grad():
        inputs = first.convolution(context.attack.subset(context.draw_rows(3)).pixel_values)
    norm = model.resnet.embedder.embedder.normalization
    assert torch.allclose(norm.running_mean, inputs.mean(dim=(0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var, inputs.var(dim=(0, 2, 3)), atol=1e-4)
    assert only(context, "batchnorm_probe", BatchNormProbe()).outcome == "completed"
    assert only(make_context(), "batchnorm_probe", BatchNormProbe()).outcome == "not_applicable"


def test_partial_fine_tuning_leaves_the_first_block_alone(make_context):
    model = prepare_partial(make_context(), Run(PartialFinetune(share=0.5), "x", 0))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith(("vit.layers.0", "vit.embeddings")) for name in trained)
    assert any(name.startswith("vit.layers.1") for name in trained)
    assert {"classifier.weight", "vit.layernorm.weight"} <= trained


def test_reset_draws_the_last_block_anew_and_keeps_the_rest(make_context):
    context = make_context()
    saved = context.model(0).state_dict()
    once, again, other = (prepare_reset(context, Run(ResetLastBlocks(), "x", seed)).state_dict() for seed in (1, 1, 2))
    changed = {name for name, value in once.items() if name in saved and value.shape == saved[name].shape
               and not torch.equal(value, saved[name])}
    assert changed and all(name.startswith(("vit.layers.1", "vit.layernorm", "classifier")) for name in changed)
    assert all(torch.equal(once[name], again[name]) for name in once)
    name = "vit.layers.1.mlp.fc1.weight"
    assert not torch.equal(once[name], other[name])
    assert torch.equal(once["classifier.weight"], context.model_with_new_head(1).state_dict()["classifier.weight"])


def test_few_shots_are_few_and_the_seeds(make_context):
    context = make_context()
    data = rows_of(context, FewShotFinetune(shots=3), 1)
    assert torch.bincount(data.labels).tolist() == [3, 3, 3]
    assert torch.equal(data.labels, rows_of(context, FewShotFinetune(shots=3), 1).labels)
    drawn = {tuple(row.flatten().tolist()) for row in context.attack.subset(context.draw_rows(1)).pixel_values}
    assert {tuple(row.flatten().tolist()) for row in data.pixel_values} <= drawn


def test_noise_changes_labels_and_pixels_by_as_much_as_it_says_and_not_the_attackers_pool(make_context):
    context = make_context(rows=300)
    before = context.attack.pixel_values.clone(), context.attack.labels.clone()
    clean = context.attack.subset(context.draw_rows(0))
    data = rows_of(context, NoisyFinetune(label_noise=0.3, pixel_noise=0.5), 0)
    wrong = (data.labels != clean.labels).double().mean().item()
    assert 0.1 < wrong < 0.3  # a third of random labels are right by chance
    spread = (data.pixel_values - clean.pixel_values).std() / clean.pixel_values.std()
    assert spread.item() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(before[0], context.attack.pixel_values) and torch.equal(before[1], context.attack.labels)


def test_muon_moves_matrices_as_torch_does(make_context):
    torch.manual_seed(0)
    matrix, vector = (nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4)))
    copies = [nn.Parameter(value.detach().clone()) for value in (matrix, vector)]
    ours = optimizers.MuonAdamW([matrix, vector], 0.1, 0.0)
    theirs = torch.optim.Muon([copies[0]], lr=0.05, weight_decay=0.0), torch.optim.AdamW([copies[1]], lr=0.05,
                                                                                          weight_decay=0.0)
    for group in ours.param_groups:
        group["lr"] = 0.05  # as a scheduler would
    for _ in range(3):
        for pair in zip((matrix, vector), copies, strict=True):
            for parameter in pair:
                parameter.grad = torch.sin(parameter.detach())
        ours.step()
        [optimizer.step() for optimizer in theirs]
    assert torch.equal(matrix, copies[0]) and torch.equal(vector, copies[1])
    result = only(make_context(), "muon_finetune", ATTACKS["muon_finetune"].config(1e-2, steps=3))
    assert result.outcome == "completed"


def test_momentum_is_nesterovs_and_trains_the_network(make_context):
    context = make_context()
    config = ATTACKS["full_finetune"].config(0.05, steps=4, optimizer="sgd_momentum")
    layer = nn.Linear(3, 2)
    (group,) = optimizers.sgd_momentum(layer, config).param_groups
    assert (group["momentum"], group["nesterov"], group["lr"]) == (0.9, True, 0.05)
    plain = only(context, "full_finetune", ATTACKS["full_finetune"].config(0.05, steps=4, optimizer="sgd"))
    heavy = only(context, "full_finetune", config)
    assert heavy.outcome == "completed" and as_tuples(heavy.curve) != as_tuples(plain.curve)


def test_every_attack_of_the_table_runs_on_a_tiny_model(make_context):
    context = make_context()
    outcomes = {}
    for name, attack in ATTACKS.items():
        chosen = {"steps": (2,)} if "steps" in attack.config.__dataclass_fields__ else {}
        run = plan_runs(attack, [0], chosen)[0]
        ((_, result),) = attack.run(context, [run])
        outcomes[name] = result.outcome
    assert {name for name, outcome in outcomes.items() if outcome != "completed"} == {
        "batchnorm_probe", "fold_linear_map", "subtract_difference", "mixed_finetune"}


def test_the_ridge_head_is_the_ridge_probe_on_raw_features(make_context):
    from hf_immunize.attacks.vision.ridge_probe import RidgeProbe

    context = make_context()
    weight, bias = ridge_head(context, 2, 1e-3)
    logits = context.features(2)["test"].double() @ weight + bias
    ((_, wanted),) = ATTACKS["ridge_probe"].run(context, [Run(RidgeProbe(1e-3, "standardized"), "x", 2)])
    assert (logits.argmax(1) == context.test.labels).double().mean().item() == wanted.curve[0].test
    config = ATTACKS["ridge_head_finetune"].config(learning_rate=0.0, steps=1, penalty=1e-3)
    still = only(context, "ridge_head_finetune", config, seed=2)
    assert still.curve[0].test == wanted.curve[0].test
