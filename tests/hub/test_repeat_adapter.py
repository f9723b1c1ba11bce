"""A PEFT adapter through attack, certificate and recheck, by the commands that its publisher and its user type."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from models import save_vit
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "certification"))
from circumstances import save_adapter  # noqa: E402

from hf_immunize.certification.trials import certified_trials, draw_trials
from hf_immunize.cli import app
from hf_immunize.errors import ModelError
from hf_immunize.models import load_on_base
from hf_immunize.records import Certificate, sha256_file
from hf_immunize.stages import attack, certify

pytest.importorskip("sklearn", reason="the demo extra (scikit-learn), whose digits are the data, is not installed")
TASK = {"primary_dataset": "builder:digits", "harmful_dataset": "builder:digits", "primary_labels": "0,1,2",
        "harmful_labels": "5,6,7"}
SMALL = ["--attacks", "ridge_probe", "lora", "--seeds", "0", "1", "--device", "cpu", "--settings",
         "ridge_probe.penalty=1e-3", "ridge_probe.features=centered", "lora.steps=6", "lora.rank=2",
         "lora.learning_rate=1e-2", "--trials", "0", "--tuning_seeds", "0"]


@pytest.fixture(scope="module")
def sat(tmp_path_factory):
    """A base and an adapter of it, attacked and certified by the stages."""
    root = tmp_path_factory.mktemp("adapter")
    save_adapter(save_vit(root / "base", seed=0), root / "adapter", spread=0.5)
    (root / "task.yaml").write_text(yaml.safe_dump(TASK))
    task = ["--config", str(root / "task.yaml")]
    attack.main([*task, "--model_path", str(root / "base"), "--role", "control", *SMALL])
    attack.main([*task, "--model_path", str(root / "adapter"), "--adapter_base", str(root / "base"), *SMALL])
    certify.main([*task, "--model_path", str(root / "adapter"), "--base_path", str(root / "base"), "--device", "cpu"])
    return root


@pytest.fixture
def root(sat, tmp_path):
    return shutil.copytree(sat, tmp_path / "sat")


def verify(root, *more):
    done = CliRunner().invoke(app, ["verify", str(root / "adapter"), "--base", str(root / "base"), "--json", *more])
    assert done.stdout, done.output
    return done.exit_code, json.loads(done.stdout)


def test_an_adapter_s_attacks_come_out_again_on_its_base(root):
    certificate = Certificate.read(root / "adapter/certificate.json")
    assert certificate.subject.weights == {
        "adapter_model.safetensors": sha256_file(root / "adapter/adapter_model.safetensors")}
    assert certificate.subject.parameters == certificate.control.parameters
    trials = certified_trials(root / "adapter", certificate)
    seed = next(seed for seed in range(1000) if {("subject", "lora"), ("subject", "ridge_probe")} <= {
        key[:2] for key in draw_trials(trials, 3, seed)})
    code, found = verify(root, "--rejudge", "--recheck", "3", "--recheck-seed", str(seed))
    told = [item["message"] for item in found["findings"] if item["code"] == "recheck"]
    assert code == 0 and found["trust"]["level"] == "repeated" and len(told) == 3, found
    assert all(line.endswith("it holds.") for line in told), told


def test_an_adapter_is_attacked_afresh(root):
    code, found = verify(root, "--reattack", "2", "--recheck-seed", "1")
    (told,) = [item["message"] for item in found["findings"] if item["code"] == "reattack"]
    assert code == 0 and told.startswith("the strongest of 2 attacks") and "on the base" in told


def test_another_base_is_refused(root):
    save_vit(root / "base", seed=7)
    code, found = verify(root, "--recheck", "1")
    assert code == 3 and any("expected the certificate's control" in item["message"] for item in found["findings"])


def test_an_adapter_is_its_base_with_the_updates_added(root):
    base, merged = load_on_base(root / "base", None), load_on_base(root / "adapter", root / "base")
    before, after = base.state_dict(), merged.state_dict()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert set(before) == set(after) and changed and all(".q_proj" in name or ".v_proj" in name or "query" in name
                                                         or "value" in name for name in changed)
    assert all(parameter.requires_grad for parameter in merged.parameters())


@pytest.mark.parametrize("change, told", [
    (lambda folder: folder.joinpath("adapter_model.safetensors").rename(folder / "adapter_model.bin"), "a pickle or"),
    (lambda folder: folder.joinpath("adapter_config.json").write_text("{"), "an adapter's configuration"),
    (lambda folder: edit(folder, megatron_config={"a": 1}), "layers of another library"),
    (lambda folder: edit(folder, target_modules=["nowhere"]), "fits its base and can be merged"),
    (lambda folder: edit(folder, target_modules=".*(q_proj|k_proj|v_proj|query|key|value)"), "missing adapter keys"),
])
def test_adapters_that_cannot_be_put_on(root, change, told):
    change(root / "adapter")
    with pytest.raises(ModelError, match=told):
        load_on_base(root / "adapter", root / "base")


def test_an_adapter_alone(root):
    with pytest.raises(ModelError, match="expected the folder of the base beside the PEFT adapter"):
        load_on_base(root / "adapter", None)


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
