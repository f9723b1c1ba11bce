"""Only what is trainable is in the graph, and cached activations train as images do."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_immunize.errors import ConfigError, DataError, ModelError
from hf_immunize.features import find_boundary, trainable_modules
from hf_immunize.spectra import model_spectra
from hf_immunize.training.vision.record import training_spectra

IMAGE = torch.Size([3, 8, 8])


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_the_frozen_part_is_not_in_the_graph_and_does_not_move(make_trainer, make_vit, keep_gradients):
    model = make_vit(dropout=0.3, layers=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    model.vit.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    model.vit.layers[1].dropout.register_forward_hook(lambda module, *_: seen.append(module.training))
    trainer = make_trainer(model=model, trainable_modules="last:1", callbacks=[keep_gradients])
    trainer.train()
    assert seen and not any(seen)  # the boundary carries no graph, and frozen dropout is off
    assert all(name.startswith(("vit.layers.2", "vit.layernorm", "classifier")) for name in keep_gradients.steps[0])
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith(("vit.layers.2", "vit.layernorm", "classifier")) for name in moved)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2, "ema_decay": 0.9, "feature_distillation": 2.0}],
    ids=["plain", "more"],
)
def test_cached_and_uncached_training_end_at_the_same_weights(make_trainer, make_vit, make_pixels, tmp_path, options):
    def run(cached: bool, folder: str):
        trainer = make_trainer(
            model=make_vit(dropout=0.2, layers=3),
            evaluation=make_pixels(12, seed=3),
            trainable_modules="last:1",
            cache_frozen_features=cached,
            feature_cache_dir=str(tmp_path / "cache"),
            output_dir=str(tmp_path / folder),
            distillation=1.0,
            max_primary_drop=50.0,
            eval_steps=2,
            **options,
        )
        trainer.train()
        return trainer

    plain, cached, again = run(False, "plain"), run(True, "cached"), run(True, "again")
    for name, value in weights(plain).items():
        # Softmax does not see a key's bias: its gradient is rounding alone, which AdamW scales up to a step.
        assert name.endswith("k_proj.bias") or torch.allclose(value, weights(cached)[name], atol=1e-6), name
        assert torch.equal(weights(cached)[name], weights(again)[name])
    logits = [held.model.eval()(make_pixels(12, seed=3).pixel_values).logits for held in (plain, cached)]
    assert torch.allclose(*logits, atol=1e-5)
    assert cached.guard.history[0]["metric"] == plain.guard.history[0]["metric"]
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 4  # 3 datasets and logits


def test_the_trunk_is_not_run_again(make_trainer, make_vit, tmp_path):
    model = make_vit(layers=3)
    trainer = make_trainer(
        model=model, trainable_modules="last:1", cache_frozen_features=True, feature_cache_dir=str(tmp_path / "c")
    )
    calls = []
    trainer.cache_features()
    model.vit.layers[0].layernorm_before.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert not calls
    with torch.no_grad():
        model(pixel_values=torch.zeros(2, *IMAGE))
    assert calls  # outside of training the model is whole


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_spectra_start_at_cached_activations_and_are_those_of_the_images(make_trainer, make_vit, tmp_path, kind):
    torch.manual_seed(0)
    small = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3, layer_type="basic")
    model = make_vit(layers=3) if kind == "vit" else ResNetForImageClassification(small)
    trained = "last:1" if kind == "vit" else "resnet.encoder.stages.1,classifier"
    trainer = make_trainer(
        model=model, trainable_modules=trained, cache_frozen_features=True, feature_cache_dir=str(tmp_path / "c")
    )
    tasks = {"primary": trainer.primary_dataset, "harmful": trainer.harmful_dataset}
    wanted = model_spectra(trainer.model, trainer.site, tasks)
    trainer.cache_features()
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(lambda *_: pytest.fail("the frozen part was run again"))
    trainer.model.train()
    found = training_spectra(trainer)
    assert trainer.model.training and all(p.is_contiguous() for p in trainer.model.parameters())
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine.task, mine.rows, mine.rank, mine.status) == (theirs.task, theirs.rows, theirs.rank, theirs.status)
        assert mine.eigenvalues == pytest.approx(theirs.eigenvalues, rel=1e-3, abs=1e-6 * theirs.eigenvalues[0])


def test_a_look_at_the_spectra_before_training_finds_the_activations(make_trainer, make_vit, tmp_path):
    """As hf-immunize immunize does it, which looks at the base first."""
    trainer = make_trainer(
        model=make_vit(layers=3), trainable_modules="last:1", cache_frozen_features=True,
        feature_cache_dir=str(tmp_path / "c"),
    )  # fmt: skip
    assert [record.task for record in training_spectra(trainer)] == ["primary", "harmful"]
    trainer.train()


def test_other_weights_or_images_are_another_cache(make_trainer, make_vit, make_pixels, tmp_path):
    def folders(**options) -> int:
        make_trainer(
            trainable_modules="last:1", cache_frozen_features=True, feature_cache_dir=str(tmp_path / "c"), **options
        ).cache_features()
        return len([path for path in (tmp_path / "c").iterdir() if path.is_dir()])

    assert (folders(), folders()) == (2, 2)
    assert (folders(primary=make_pixels(24, seed=5)), folders(model=make_vit(seed=2))) == (3, 5)


class Shaky(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, row):
        return {"pixel_values": torch.randn(3, 8, 8), "labels": row % 3}


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"trainable_modules": "vit"}, ConfigError, "a frozen part that can be skipped"),
        ({"trainable_modules": "last:1", "primary": Shaky()}, DataError, "random transform cannot be cached"),
        ({"trainable_modules": "last:1", "augmentation": "flip"}, ConfigError, "got both"),
        ({"trainable_modules": "last:1", "gradient_checkpointing": True}, ConfigError, "got both"),
        ({"trainable_modules": "last:9"}, ModelError, "at most 2 blocks after 'last:', got 9"),
        ({"trainable_modules": "nothing"}, ModelError, "a pattern that fits modules"),
        ({"trainable_modules": "vit.layers.0.dropout"}, ConfigError, "modules with parameters"),
        ({"trainable_modules": "classifier"}, ConfigError, "inputs depend on what is trained"),
    ],
)
def test_what_cannot_be_frozen_or_cached_is_refused(make_trainer, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        make_trainer(cache_frozen_features=True, feature_cache_dir=str(tmp_path / "c"), **options).train()


class Skipping(nn.Module):
    """The last layer looks back past the boundary: only the whole network determines its output."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(192, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, pixel_values):
        first = self.first(pixel_values.flatten(1))
        return (self.third(self.second(first) + first),)


def test_a_connection_past_the_boundary_moves_the_boundary_or_leaves_none():
    torch.manual_seed(0)
    model = Skipping()
    model.first.requires_grad_(False)
    assert find_boundary(model, IMAGE) is None
    model.second.requires_grad_(False)
    boundary = find_boundary(model, IMAGE)
    assert (boundary.name, boundary.skipped) == ("third", ("first", "second"))


def test_nothing_frozen_has_no_boundary_and_nothing_trainable_is_an_error(make_vit):
    model = make_vit()
    assert find_boundary(model, IMAGE) is None
    with pytest.raises(ModelError, match="expected trainable parameters, got none"):
        find_boundary(model.requires_grad_(False), IMAGE)


def test_patterns_are_names_ends_of_names_or_one_expression(make_vit):
    model = make_vit(layers=3)
    assert trainable_modules(model, "last:2")[:2] == ["vit.layers.1", "vit.layers.2"]
    assert trainable_modules(model, "layers.2,classifier") == ["vit.layers.2", "classifier"]
    assert trainable_modules(model, r"vit\.layers\.[01]") == ["vit.layers.0", "vit.layers.1"]
    with pytest.raises(ModelError, match="expected a regular expression"):
        trainable_modules(model, "vit.layers.[")


@pytest.fixture
def another_precision():
    """Accelerate keeps one precision per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def first_gradients(make_trainer, keep_gradients, model, cached, folder, **options):
    seen = type(keep_gradients)()
    trainer = make_trainer(
        model=model, trainable_modules="last:1", cache_frozen_features=cached, feature_cache_dir=str(folder),
        callbacks=[seen], max_steps=1, distillation=1.0, **options,
    )
    trainer.train()
    return trainer, torch.cat([seen.steps[0][name].flatten() for name in sorted(seen.steps[0])])


@pytest.mark.parametrize("half", [False, True], ids=["no", "bf16"])
def test_the_cache_holds_what_the_precision_in_its_key_says(
    make_trainer, make_vit, make_pixels, keep_gradients, tmp_path, another_precision, half
):
    """Under bf16 two bytes a number, from a forward under autocast, handed out as the forward had them."""
    model = make_vit(layers=3)
    trainer, cached = first_gradients(make_trainer, keep_gradients, model, True, tmp_path / "c", bf16=half)
    store = trainer.train_dataset.store
    assert {column.dtype for column in store._columns} == {torch.bfloat16 if half else torch.float32}
    assert {one.dtype for one in trainer.train_dataset[0]["boundary"]} == {torch.float32}  # ViT's residual stream
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        rows = trainer.frozen.boundary.rows(make_vit(layers=3).eval(), make_pixels(24).pixel_values)
    assert torch.equal(torch.stack([store[row][0] for row in range(24)]), rows[0].to(store[0][0].dtype))
    assert trainer.train_dataset.teacher[0][0].dtype == torch.float32
    AcceleratorState._reset_state(reset_partial_state=True)
    _, plain = first_gradients(make_trainer, keep_gradients, make_vit(layers=3), False, tmp_path / "c", bf16=half)
    assert (cached - plain).norm() / plain.norm() < (2e-2 if half else 1e-5)


def test_another_precision_is_another_cache(make_trainer, make_vit, tmp_path, another_precision):
    for half, folders in ((False, 2), (True, 4), (True, 4)):
        AcceleratorState._reset_state(reset_partial_state=True)
        make_trainer(
            trainable_modules="last:1", cache_frozen_features=True, feature_cache_dir=str(tmp_path), bf16=half
        ).cache_features()
        assert len([path for path in tmp_path.iterdir() if path.is_dir() and path.name != "run"]) == folders


def test_filling_the_cache_takes_no_more_rows_at_a_time_than_a_step_does(make_trainer, make_vit, tmp_path):
    model, seen = make_vit(layers=3), []
    model.vit.embeddings.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    trainer = make_trainer(
        model=model, trainable_modules="last:1", cache_frozen_features=True, feature_cache_dir=str(tmp_path / "c"),
        per_device_train_batch_size=3, per_device_harmful_batch_size=6,
    )  # fmt: skip
    assert max(seen) < 6  # the constructor looks at a few rows only
    trainer.cache_features()
    assert seen and max(seen) <= 6 and trainer.args.per_device_eval_batch_size == 8
