"""The table of attacks: in the docs as it is in the code, and open to attacks of one's own."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from test_attack_finetune import only

from hf_immunize.attacks import ATTACKS, Attack, register_attack, row, setting
from hf_immunize.attacks.core.plan import attacks_table, describe_attacks
from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS
from hf_immunize.attacks.vision import _preparations as first
from hf_immunize.errors import ConfigError, ModelError
from hf_immunize.exam import PROTOCOLS

DOCS = Path(__file__).parents[2] / "docs" / "attacks.md"


def test_the_docs_hold_the_table_as_it_is_now():
    found = DOCS.read_text(encoding="utf-8")
    assert attacks_table(ATTACKS) in found, "write attacks_table(ATTACKS) into docs/attacks.md"


def test_attacks_say_what_they_cover_need_and_refuse():
    assert not [name for name, attack in {**ATTACKS, **DIFFUSION_ATTACKS}.items() if not attack.covers]
    shown = describe_attacks({**ATTACKS, **DIFFUSION_ATTACKS})
    for name, line in (("batchnorm_probe", "does not apply to models without batch normalisation"),
                       ("mixed_finetune", "needs benign"), ("ridge_probe", "undoes any condition number, in one solve"),
                       ("diffusion_textual_inversion", "does not apply to pipelines in which nothing names")):
        about = shown.partition(f"{name} (")[2].partition(f"  {name}.")[0]
        assert line in about, (name, about)


@pytest.mark.parametrize("name", ["partial_finetune", "reset_last_blocks", "layerwise_finetune", "all_layers_probe"])
def test_networks_without_blocks_are_refused_as_said(make_context, monkeypatch, name):
    def nothing(model, *_):
        raise ModelError("expected a list of blocks, got none")

    for module in ("_preparations.last_blocks", "_phases.block_names", "all_layers_probe.block_sites"):
        monkeypatch.setattr(f"hf_immunize.attacks.vision.{module}", nothing)
    result = only(make_context(), name, ATTACKS[name].config())
    assert result.outcome == "not_applicable" and "list of blocks" in result.note
    assert ATTACKS[name].refuses == "models without a list of blocks"


def test_the_thorough_exam_has_every_attack_and_standard_those_against_coordinates():
    assert set(PROTOCOLS["thorough"].attacks) == set(ATTACKS)
    named = {"canonical_finetune", "relative_finetune", "lora_all_linear", "all_layers_probe"}
    assert named <= set(PROTOCOLS["standard"].attacks) and "canonical_finetune" in PROTOCOLS["quick"].attacks


def test_an_attack_of_ones_own_is_one_row(make_context):
    mine = row(
        "SGD on all weights.", "nothing in particular", prepare=first.unfrozen, optimizer="sgd",
        learning_rate=setting(0.1, "Peak learning rate.", sweep=(0.1, 1.0)),
    )  # fmt: skip
    try:
        assert register_attack("my_finetune", mine) is ATTACKS["my_finetune"]
        result = only(make_context(), "my_finetune", mine.config(steps=2))
        assert result.outcome == "completed" and len(result.curve) == 2
        with pytest.raises(ConfigError, match="expected an identifier that is not in .*got 'my_finetune'"):
            register_attack("my_finetune", mine)
    finally:
        ATTACKS.pop("my_finetune", None)


def test_what_is_no_attack_is_refused():
    @dataclass
    class Thawed:
        """A config that could change under way."""

    for name, config, told in (("a b", mine_config(), "an identifier"), ("thawed", Thawed, "a frozen dataclass")):
        with pytest.raises(ConfigError, match=f"expected {told}"):
            register_attack(name, Attack(config=config, run=lambda context, runs: iter(()), family="data"))
    refused = (("benign_mine", (), "does not begin with 'benign_'"), ("mine", ("luck",), r"got \['luck'\]"))
    for name, needs, told in refused:
        with pytest.raises(ConfigError, match=told):
            register_attack(name, Attack(mine_config(), lambda context, runs: iter(()), "data", needs=needs))
    assert "mine" not in ATTACKS
    assert "thawed" not in ATTACKS and "a b" not in ATTACKS


def mine_config():
    @dataclass(frozen=True)
    class Told:
        """A config."""

    return Told
