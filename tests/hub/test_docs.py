"""The two pages of documentation, executed: every bash and Python block, in order, against the loopback Hub."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from loopback import Loopback
from preset_exam import released_vit
from published import TOKEN, client
from zygote import Zygote

from hf_immunize.hub import publish
from hf_immunize.hub.signature import make_key

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page, *languages):
    found = re.findall(r"^```(\w+)\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)
    return [(language, text) for language, text in found if language in languages]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A Hub, a home, and a process that has imported what readers import."""
    home = tmp_path_factory.mktemp("home")
    with Loopback(token=TOKEN) as hub:
        zygote = Zygote(os.environ | {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(DOCS.parent), "OMP_NUM_THREADS": "1",
        }, "torch", "transformers.models.vit.modeling_vit", "transformers.models.auto.modeling_auto")
        yield hub, zygote, home
        zygote.close()


@pytest.fixture
def hub(machine, monkeypatch):
    """The Hub, empty."""
    server, _, home = machine
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for held in (server.repositories, server.objects, server.requests):
        held.clear()
    shutil.rmtree(home, ignore_errors=True)
    return server


@pytest.fixture
def reader(hub, machine, tmp_path):
    """Runs a block as a reader would, in ``tmp_path``, with the console script on the path."""

    def run(language, text):
        done = machine[1].run(["bash", "-euc", text] if language == "bash" else ["python", "-c", text], tmp_path)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.mark.slow
def test_publish_in_five_minutes(hub, tmp_path, reader):
    released_vit(tmp_path)
    policy = next(text for language, text in blocks("publish.md", "yaml") if "start_from" in text)
    (tmp_path / "policy.yaml").write_text(policy)
    steps = blocks("publish.md", "bash", "python")
    assert [language for language, _ in steps] == ["bash"] * 5 + ["python"]
    outputs = []
    for number, (language, text) in enumerate(steps):
        outputs.append(reader(language, text))
        assert ("commit" in hub.requests) == (number >= 4), "something was sent before its step"
    assert "Intact" in outputs[0] and "nothing was sent" in outputs[3] and "Published: " in outputs[4]
    assert outputs[5].split() == [hub.head("owner/model").oid, "True"]
    assert {"certificate.sig", "SHA256SUMS", "README.md"} <= set(hub.head("owner/model").files)
    workflow = next(yaml.safe_load(text) for language, text in blocks("publish.md", "yaml") if "jobs" in text)
    runs = [step["run"] for step in workflow["jobs"]["publish"]["steps"] if "run" in step]
    for line in runs[1:]:
        reader("bash", line.replace("hf-immunize publish", "hf-immunize publish --dry-run"))


@pytest.mark.slow
def test_what_to_believe(hub, tmp_path, reader):
    key = make_key(tmp_path / "key.pem")
    publish(released_vit(tmp_path), "owner/model", api=client(hub), signing_key=tmp_path / "key.pem")
    steps = [step for step in blocks("downloaded.md", "bash", "python") if "--recheck" not in step[1]]
    assert [language for language, _ in steps] == ["bash", "python", "python", "bash", "bash"]
    for language, text in steps:
        reader(language, text.replace("KEY", key))
    (tmp_path / "policy.yaml").write_text("start_from: strict\nexam: standard\nmin_seeds: 5\n"
                                          "attacker_holds_base: false\nmax_primary_drop: 4.0\n")
    (job,) = (yaml.safe_load(text) for _, text in blocks("downloaded.md", "yaml"))
    reader("bash", job[1]["run"].replace("$PUBLISHER_KEY", key))
    folder = client(hub).snapshot_download("owner/model", local_dir=tmp_path / "plain")
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder)
    assert done.returncode == 0
    hub.put_revision("owner/model", hub.head("owner/model").files | {"model.safetensors": b"swapped"})
    for language, text in steps[:2]:
        with pytest.raises(AssertionError, match="model.safetensors"):
            reader(language, text.replace("KEY", key))


def test_the_citation_is_one_that_tools_read():
    citation = yaml.safe_load((DOCS.parent / "CITATION.cff").read_text(encoding="utf-8"))
    from hf_immunize.version import __version__

    assert citation["version"] == __version__ and citation["cff-version"] == "1.2.0" and citation["authors"]
    assert citation["license"] == "Apache-2.0"
