import pytest

from hf_immunize.attacks import ATTACKS, parse_settings, plan_runs
from hf_immunize.attacks.core.plan import describe_attacks
from hf_immunize.errors import ConfigError


def test_every_attack_sweeps_its_rate_over_three_decades_or_its_penalty():
    for name, attack in ATTACKS.items():
        configs = [run.config for run in plan_runs(attack, [0])]
        fields = attack.config.__dataclass_fields__
        swept = next(field for field in ("learning_rate", "penalty", "weight_decay") if field in fields)
        values = [getattr(config, swept) for config in configs]
        assert max(values) >= 999 * min(values), name


def test_trials_are_named_after_what_is_swept_and_files_do_not_collide():
    for attack in ATTACKS.values():
        runs = plan_runs(attack, [0, 1])
        assert len({(run.trial, run.seed) for run in runs}) == len(runs)
        assert all("=" in run.trial for run in runs)


def test_settings_replace_sweeps_and_make_new_ones():
    settings = parse_settings(["lora.learning_rate=1e-3", "lora.rank=4,8", "lora.steps=60"], ATTACKS)
    assert settings == {"lora": {"learning_rate": (1e-3,), "rank": (4, 8), "steps": (60,)}}
    runs = plan_runs(ATTACKS["lora"], [0, 7], settings["lora"])
    assert [(run.trial, run.seed) for run in runs] == [
        ("learning_rate=0.001,rank=4", 0), ("learning_rate=0.001,rank=4", 7),
        ("learning_rate=0.001,rank=8", 0), ("learning_rate=0.001,rank=8", 7),
    ]
    assert {run.config.steps for run in runs} == {60} and isinstance(runs[0].config.rank, int)


def test_none_and_text_are_read_by_the_fields_type():
    settings = parse_settings(["lora.targets=none", "lora.optimizer=sgd", "lora.max_grad_norm=0"], ATTACKS)
    assert settings["lora"] == {"targets": (None,), "optimizer": ("sgd",), "max_grad_norm": (0.0,)}


@pytest.mark.parametrize("word, message", [
    ("lora", r"expected attack.field=value\[,value...\].*got 'lora'"),
    ("lora.rank", "expected attack.field=value"),
    ("loro.rank=3", "expected an attack in .*got 'loro'"),
    ("lora.runk=3", "expected a field of lora in .*got 'runk'"),
    ("lora.rank=2.5", "expected int values in 'lora.rank=2.5', got '2.5'"),
    ("lora.learning_rate=fast", "expected float values in .*got 'fast'"),
])
def test_bad_settings(word, message):
    with pytest.raises(ConfigError, match=message):
        parse_settings([word], ATTACKS)


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_bad_seeds(seeds):
    with pytest.raises(ConfigError, match="expected at least one seed and none twice"):
        plan_runs(ATTACKS["lora"], seeds)


def test_a_value_twice_is_refused():
    with pytest.raises(ConfigError, match="expected different values of rank"):
        plan_runs(ATTACKS["lora"], [0], {"rank": (4, 4)})


def test_the_description_names_every_field():
    text = describe_attacks(ATTACKS)
    for name, attack in ATTACKS.items():
        for field in attack.config.__dataclass_fields__.values():
            assert f"{name}.{field.name}=" in text
            assert field.metadata.get("help"), f"{name}.{field.name} has no help"
