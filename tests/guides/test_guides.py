"""docs/extend: each guide's file and its test run as printed; plug-ins are found, named and imported late."""

import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
from guide_pages import files_of, plugged

from hf_immunize.attacks import ATTACKS
from hf_immunize.attacks.core.plan import find_attack
from hf_immunize.diffusion import DENOISERS, DenoiserFamily, register_family
from hf_immunize.diffusion.denoisers import PROMPT_READERS
from hf_immunize.errors import ConfigError
from hf_immunize.training import OBJECTIVES
from hf_immunize.training.core.registry import terms_of

NAMES = ("bias_finetune",)


def functions_of(test):
    names = {}
    exec(compile(test.read_text(), str(test), "exec"), names)
    return names


def test_an_attack(tmp_path, monkeypatch):
    file, test = files_of("attack.md", tmp_path)
    with plugged(monkeypatch, file, names=NAMES):
        assert "bias_finetune" not in ATTACKS
        assert find_attack("bias_finetune", ATTACKS).covers.startswith("a defence that counts on weight matrices")
        names = functions_of(test)
        (tmp_path / "model").mkdir()
        names["test_biases_learn_and_nothing_else_moves"](tmp_path / "model")


def test_an_objective_on_features_and_one_on_weights(tmp_path, monkeypatch):
    file, test = files_of("objective.md", tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with plugged(monkeypatch, file, names=("centroids", "narrow"), table=OBJECTIVES):
        assert "narrow" not in OBJECTIVES
        assert [term.name for term in terms_of("condition_number+narrow")][-1] == "last_layer_directions"
        functions_of(test)["test_both_terms_fall"](tmp_path)
    with plugged(monkeypatch), pytest.raises(ConfigError, match=r"got 'condition_nunber'\. Did you mean condition_n"):
        terms_of("condition_nunber")


def test_a_family_of_denoisers(tmp_path, monkeypatch):
    file, test = files_of("family.md", tmp_path)
    kind, pipeline = diffusers.AuraFlowTransformer2DModel, diffusers.AuraFlowPipeline
    with plugged(monkeypatch, file, names=(kind,), table=DENOISERS):
        try:
            assert kind not in DENOISERS
            functions_of(test)["test_the_denoiser_is_asked_as_its_pipeline_asks_it"](monkeypatch)
            with pytest.raises(ConfigError, match="expected a class that is none of .*AuraFlowPipeline.*: it is there"):
                register_family(DenoiserFamily(type("Other", (), {}), DENOISERS[kind], {pipeline: None}))
        finally:
            PROMPT_READERS.pop(pipeline, None)


def test_a_plug_in_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "broken_attack.py"
    broken.write_text("import nothing_of_this_name\n")
    with plugged(monkeypatch, broken), pytest.raises(
        ConfigError, match="broken_attack.py' of HF_IMMUNIZE_PLUGINS to be imported, got ModuleNotFoundError"
    ):
        find_attack("bias_finetune", ATTACKS)
    with plugged(monkeypatch, tmp_path / "gone.py"), pytest.raises(ConfigError, match="there is no file"):
        find_attack("bias_finetune", ATTACKS)
    with pytest.raises(ConfigError, match=r"got 'full_finetun'\. Did you mean full_finetune\?"):
        find_attack("full_finetun", ATTACKS)


def test_an_entry_point_is_imported_when_a_name_is_unknown_and_not_for_help(tmp_path):
    """A distribution as pip leaves it behind: a module, and metadata with the entry point."""
    file, _ = files_of("attack.md", tmp_path)
    file.write_text("print('imported')\n" + file.read_text())
    about = tmp_path / "bias_attack-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: bias-attack\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text("[hf_immunize.plugins]\nbias = bias_attack\n")
    code = (
        "from hf_immunize.attacks import ATTACKS\nfrom hf_immunize.attacks.core.plan import find_attack\n"
        "find_attack('lora', ATTACKS); print('known')\n"
        "print(find_attack('bias_finetune', ATTACKS).plugin.name)\n"
    )
    root = Path(__file__).parents[2]
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": f"{root}:{tmp_path}", "PATH": ""},
    ).stdout.split("\n")
    assert told[:3] == ["known", "imported", "bias-attack 1.2"]
