import ast
import re
import shutil
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import record_builders as build
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hf_immunize.errors import ConfigError, RecordError
from hf_immunize.hub import CardOptions, render_card, write_card
from hf_immunize.hub.markdown import code, prose
from hf_immunize.records import AttackTrace, Certificate, ImmunizationRecord
from hf_immunize.report import curve_pictures

HOSTILES = [
    "</h1><script>alert(1)</script><img src=x onerror=alert(1)>",
    "a | b |\n|---|---|\n| c | **RESISTS** |",
    "x\n\n# A heading\n\n- a list\n\n```\nfence",
    "---\nlicense: mit\ntags: [safe]\n---\n",
    "[click](javascript:alert(1)) ![p](https://evil.example/p.png) <https://evil.example>",
    "{{ 7 * 7 }}{% for x in range(9) %}{{ certificate }}{% endfor %}",
    "`code` ``` ~~~ **bold** _it_ ~~gone~~ $x$ &lt; \\| \\`",
    "https://evil.example www.evil.example me@evil.example",
    "1. one", "- two", "> quote", "    indented", "\u202eevil\u0000\u2028end", "!!python/object:os.system",
    "", "'\"#: - [", "null",
]


def parse(source):
    """The card's tokens, links from bare addresses included, as (type, nesting) with the text left out."""
    body = source.split("\n---\n", 1)[1]
    return [
        (token.type, token.nesting)
        for block in MarkdownIt("commonmark").enable("table").parse(body)
        for token in [block, *(block.children or [])]
    ]


def pictures(source):
    """Addresses of the card's pictures."""
    blocks = MarkdownIt("commonmark").enable("table").parse(source.split("\n---\n", 1)[1])
    return [inner.attrs["src"] for block in blocks for inner in block.children or [] if inner.type == "image"]


def hostile_folder(root, evil):
    attacks = [replace(build.ATTACKS[2], name=re.sub(r"[/\x00]", "", evil[:40]) or "a", family=evil, reason=evil),
               *build.ATTACKS[3:]]
    return build.exam_folder(root, build.Exam(
        name=evil, attacks=attacks, sources=(evil,), labels=(evil, *"bcde"), statement=evil,
        extra={"rule": evil, "threshold_rule": evil, "not_run": [evil, evil], "expires": evil},
    ))


def table(source, after):
    """Rows of the first table below a heading."""
    part = source.split(f"## {after}\n", 1)[1]
    lines = [line for line in part.split("\n## ", 1)[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_metadata_parses_back_to_the_same_numbers(tmp_path):
    folder = build.exam_folder(tmp_path, build.Exam(sources=("owner/digits",)))
    certificate = Certificate.read(folder / "certificate.json")
    options = CardOptions(license="apache-2.0", base_model="owner/base", repo_id="me/model")
    data = ModelCard(render_card(folder, options)).data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "transformers", "image-classification", "apache-2.0")
    assert (data.base_model, data.base_model_relation, data.datasets) == ("owner/base", "finetune", ["owner/digits"])
    assert "immunized" in data.tags and data.model_name == "condition_number"
    results = {result.metric_name: result for result in data.eval_results}
    assert results["Primary metric, percent"].metric_value == 98.0
    assert results["Slow-down under lora"].metric_value == 1.1
    assert results["Slow-down under lora"].metric_args["verdict"] == "FAILS"
    bound = results["Slow-down under linear_probe_gd, lower bound"]
    assert bound.metric_value == certificate.cells[0].slow_down.low and "estimate" not in bound.metric_args["interval"]
    ridge = results["Harmful accuracy after ridge_probe, percent"]
    assert ridge.metric_value == pytest.approx(100 * sum(certificate.cells[2].subject.accuracy) / 3)
    assert results["Relative immunization ratio (explains, does not certify)"].metric_value == 1585.0
    assert {result.dataset_type for result in data.eval_results} == {"owner/digits"}


def test_what_is_not_known_is_left_out(tmp_path):
    source = render_card(build.exam_folder(tmp_path))
    metadata = ModelCard(source).data.to_dict()
    assert not {"license", "base_model", "base_model_relation", "datasets"} & set(metadata)
    assert "Licence: not stated" in source
    assert "reset_last_blocks" not in str(metadata["model-index"])


def test_a_base_named_by_hub_id_is_linked(tmp_path):
    control = build.fingerprint(build.base_folder(tmp_path), "owner/base")
    data = ModelCard(render_card(build.exam_folder(tmp_path, build.Exam(control=control)))).data
    assert (data.base_model, data.base_model_relation) == ("owner/base", "finetune")


def test_a_failed_model_opens_with_what_failed(tmp_path):
    source = render_card(build.exam_folder(tmp_path))
    body = source.split("\n---\n", 1)[1]
    failed = body.index("This model failed its immunization exam")
    assert failed < body.index("## What failed") < body.index("## What it is")
    opening = body[: body.index("## What it is")]
    assert "`ridge_probe`" in opening and "`lora`" in opening and "`linear_probe_adam`" not in opening


def test_a_model_that_fails_by_its_utility_says_so(tmp_path):
    drop = build.interval(28.4, 25.0, 31.0)
    ruined = build.Utility(metric="accuracy", base=98.4, immunized=70.0, drop=drop, rows=450)
    exam = build.Exam(attacks=build.ATTACKS[:2], overall="FAILS", extra={"utility": ruined})
    opening = render_card(build.exam_folder(tmp_path, exam)).split("## What it is")[0]
    assert "## What failed" in opening and "drop of +28.4 (+25.0 to +31.0) points" in opening


def guard_on_a_loss(folder):
    """The folder's record as the diffusion trainer writes it: the guard watched a loss, not the exam's metric."""
    path = folder / "immunization.json"
    record = ImmunizationRecord.read(path)
    guard = record.guard.model_copy(update={"metric": "retain loss, -100 ln", "drop": 8.9, "allowed": 9.53})
    record.model_copy(update={"guard": guard}).write(path)
    return folder


def test_the_training_guard_is_told_in_its_own_metric(tmp_path):
    source = render_card(guard_on_a_loss(build.exam_folder(tmp_path)))
    assert "the training guard on retain loss, -100 ln held on its own split: drop +8.90, allowed 9.53." in source
    assert "9.53 points" not in source


@pytest.mark.parametrize(
    ("overall", "expected"),
    [("RESISTS", "did not break this model within their budgets"), ("INCONCLUSIVE", "did not establish"),
     ("NOT RUN", "did not establish"), ("NOT APPLICABLE", "did not establish")],
)
def test_other_outcomes_open_with_theirs(tmp_path, overall, expected):
    ran = [attack for attack in build.ATTACKS if attack.ran]
    source = render_card(build.exam_folder(tmp_path, build.Exam(overall=overall, attacks=ran)))
    assert expected in source.split("## What it is")[0] and "## What failed" not in source


def test_every_cell_is_in_the_table_failures_first(tmp_path):
    rows = table(render_card(build.exam_folder(tmp_path)), "Verdicts")
    assert sorted(row[0].strip("`") for row in rows) == sorted(attack.name for attack in build.ATTACKS)
    assert [row[2] for row in rows] == ["**FAILS**", "**FAILS**", "INCONCLUSIVE", "NOT RUN", "RESISTS", "RESISTS"]
    by_name = {row[0].strip("`"): row for row in rows}
    assert by_name["linear_probe_gd"][3] == "at least 66×"
    assert by_name["lora"][3] == "1.1× (0.9 to 1.5)"
    assert by_name["reset_last_blocks"][3:5] == ["–", "–"]


def test_the_card_claims_no_certainty(tmp_path):
    for overall in ("RESISTS", "FAILS", "INCONCLUSIVE"):
        ran = [attack for attack in build.ATTACKS if attack.ran]
        source = render_card(build.exam_folder(tmp_path / overall, build.Exam(overall=overall, attacks=ran)))
        assert not re.search(r"\b(proof|prove[sdn]?|guarantee[sd]?|unbreakable|tamper-?proof)\b", source, re.I)


@pytest.mark.parametrize("evil", HOSTILES, ids=lambda evil: repr(evil)[:24])
def test_names_cannot_change_the_structure(tmp_path, evil):
    tame = render_card(hostile_folder(tmp_path / "tame", "plain"))
    source = render_card(hostile_folder(tmp_path / "wild", evil))
    assert parse(source) == parse(tame)
    assert not {"html_block", "html_inline", "link_open"} & {kind for kind, _ in parse(source)}
    names = pictures(source)
    assert len(names) == 3 and all(re.fullmatch(r"plots/0\d-[a-z0-9-]+\.svg", name) for name in names)
    metadata, expected = ModelCard(source).data.to_dict(), ModelCard(tame).data.to_dict()
    assert set(metadata) == set(expected) and metadata["tags"] == expected["tags"]
    assert len(table(source, "Verdicts")) == len(table(tame, "Verdicts"))
    assert "49" not in source.split("## Verdicts")[1].split("Rule:")[0]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("`*_[]()<>|#-+=~!&\\.:1@$\n wt/hp"))))
def test_any_text_is_one_plain_paragraph_or_one_code_span(text):
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    blocks = parser.parse(f"{prose(text)}\n")
    if blocks:
        assert [block.type for block in blocks] == ["paragraph_open", "inline", "paragraph_close"]
        assert {child.type for child in blocks[1].children} <= {"text", "text_special"}
    (_, inline, _) = parser.parse(f"{code(text)}\n")
    assert [child.type for child in inline.children] == ["code_inline"]


def test_prose_reads_as_it_was_written():
    text = "1. a <b> & `c` | 100 % of $x_1$; see #3"
    (_, inline, _) = MarkdownIt("commonmark").parse(str(prose(text)))
    assert "".join(child.content for child in inline.children) == text


def test_bare_addresses_are_not_recognised_by_linkers():
    joined = str(prose("http://a.example www.b.example c@d.example"))
    assert "://" not in joined and "www." not in joined and "@" not in joined


def test_python_in_the_card_is_python_and_the_check_runs(tmp_path, monkeypatch):
    folder = build.exam_folder(tmp_path)
    source = render_card(folder, CardOptions(repo_id="me/model"))
    load, check = re.findall(r"```python\n(.*?)```", source, re.S)
    ast.parse(load)
    assert 'model_id = "me/model"' in load
    monkeypatch.chdir(tmp_path)
    folder.rename(tmp_path / "downloaded-model")
    exec(compile(check, "card", "exec"), {})
    (tmp_path / "downloaded-model/model.safetensors").write_bytes(b"swapped")
    with pytest.raises(AssertionError, match=r"model\.safetensors is not the examined file"):
        exec(compile(check, "card", "exec"), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (CardOptions(repo_id='x"\nimport os'), "expected repo_id as 'owner/name'"),
        (CardOptions(base_model="../base"), "expected base_model as 'owner/name'"),
        (CardOptions(pipeline_tag="text-generation"), "expected a pipeline tag out of image-classification"),
    ],
)
def test_options_that_cannot_be_used(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        render_card(build.exam_folder(tmp_path), options)


def test_write_card_and_thin_evidence(tmp_path):
    attacks = [replace(attack, ran=False, verdict="NOT RUN") for attack in build.ATTACKS]
    folder = build.exam_folder(tmp_path, build.Exam(
        attacks=attacks, immunization=False, spectra=False, extra={"not_run": []}))
    path = write_card(folder)
    source = path.read_text(encoding="utf-8")
    assert path.name == "README.md" and source == render_card(folder)
    assert "nothing, since no attack was run" in source and "optimizer steps" not in source
    assert [result.metric_type for result in ModelCard(source).data.eval_results] == ["accuracy"]


def test_a_card_needs_a_certificate(tmp_path):
    with pytest.raises(RecordError, match="expected a Certificate"):
        render_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


# ---- curves, and other kinds of models


def test_every_attack_that_left_a_result_has_its_curve(tmp_path):
    folder = build.exam_folder(tmp_path)
    source = write_card(folder).read_text(encoding="utf-8")
    names = pictures(source)
    assert names == [path.relative_to(folder).as_posix() for path in sorted((folder / "plots").iterdir())]
    assert len(names) == sum(attack.ran for attack in build.ATTACKS)
    for name in names:
        root = ElementTree.parse(folder / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and "Harmful accuracy" in "".join(root.itertext())
        assert not [part.tag for part in root.iter() if part.tag.rpartition("}")[2] in ("script", "image", "a", "use")]


def test_a_curve_is_that_of_the_traces(tmp_path):
    """Pixels of the mean line, back to steps and accuracies."""
    folder = build.exam_folder(tmp_path)
    root = ElementTree.fromstring(curve_pictures(folder)["plots/02-linear-probe-adam.svg"])
    polylines = root.iter("{http://www.w3.org/2000/svg}polyline")
    (_, line) = [part for part in polylines if part.get("class") == "line m1"]  # the first is the legend's
    heights = [float(point.split(",")[1]) for point in line.get("points").split()]
    traces = [AttackTrace.read(path) for path in folder.glob("traces/subject/linear_probe_adam__learning_rate=0.1*")]
    means = [sum(point.test for point in points) / len(points)
             for points in zip(*(trace.curve for trace in traces), strict=True)]
    assert heights == pytest.approx([186 - 160 * mean for mean in means], abs=0.06)


def test_a_folder_without_traces_still_gets_its_card(tmp_path):
    folder = build.exam_folder(tmp_path)
    shutil.rmtree(folder / "traces")
    assert write_card(folder).is_file() and not (folder / "plots").exists()


def certified_as(root, files, architecture="ViTForImageClassification", weights=("model.safetensors",)):
    folder = build.exam_folder(root)
    certificate = Certificate.read(folder / "certificate.json")
    subject = certificate.subject.model_copy(update={"architecture": architecture,
                                                     "weights": dict.fromkeys(weights, "0" * 64)})
    for name in files:
        (folder / name).write_text("{}")
    certificate.model_copy(update={"subject": subject, "files": dict.fromkeys(files, "0" * 64)}).write(
        folder / "certificate.json")
    return folder


@pytest.mark.parametrize(
    ("files", "architecture", "weights", "expected"),
    [
        (["config.json"], "ViTForImageClassification", ["model.safetensors"],
         ("transformers", "finetune", "image-classification", "AutoModelForImageClassification.from_pretrained(model")),
        (["config.json"], "ViTModel", ["model.safetensors"],
         ("transformers", "finetune", "image-feature-extraction", "AutoModel.from_pretrained(model_id)")),
        (["adapter_config.json"], "ViTForImageClassification", ["adapter_model.safetensors"],
         ("peft", "adapter", "image-classification", 'base_id = "owner/base"')),
        (["model_index.json"], "DDPMPipeline", ["unet/x.safetensors"],
         ("diffusers", "finetune", "unconditional-image-generation", "DiffusionPipeline.from_pretrained(model_id")),
        (["model_index.json"], "StableDiffusionPipeline", ["text_encoder/x.safetensors"],
         ("diffusers", "finetune", "text-to-image", "DiffusionPipeline.from_pretrained(model_id")),
    ],
    ids=["model", "backbone", "adapter", "pipeline", "text pipeline"],
)
def test_every_kind_of_model_has_its_metadata_and_its_snippet(tmp_path, files, architecture, weights, expected):
    card = ModelCard(render_card(certified_as(tmp_path, files, architecture, weights),
                                 CardOptions(base_model="owner/base", repo_id="me/model")))
    data = card.data
    assert (data.library_name, data.base_model_relation, data.pipeline_tag) == expected[:3]
    snippet = re.findall(r"```python\n(.*?)```", card.text, re.S)[0]
    ast.parse(snippet)
    assert expected[3] in snippet and 'model_id = "me/model"' in snippet


def test_the_card_says_when_a_model_runs_code(tmp_path):
    folder = certified_as(tmp_path, ["config.json"])
    assert "trust_remote_code" not in render_card(folder)
    (folder / "config.json").write_text('{"vision_config": {"auto_map": {"AutoModel": "modeling.Mine"}}}')
    source = render_card(folder)
    assert "'auto&#95;map' in config.json" in source
    assert source.index("> [!WARNING]\n> **Loading this model") < source.index("```python")


def test_figures_name_their_source_and_claim_no_verification_by_the_hub(tmp_path):
    results = ModelCard(render_card(build.exam_folder(tmp_path), CardOptions(repo_id="me/model"))).data.eval_results
    assert {result.source_url for result in results} == {
        "https://huggingface.co/me/model/blob/main/certificate.json"}
    assert {(result.verified, result.verify_token) for result in results} == {(None, None)}


def test_somebodys_own_card_is_kept(tmp_path):
    folder = build.exam_folder(tmp_path)
    (folder / "README.md").write_text("# My model\nTwo years of work.\n")
    for _ in range(2):
        write_card(folder)
        assert "hf_immunize" in (folder / "README.md").read_text()
        assert (folder / "README.original.md").read_text() == "# My model\nTwo years of work.\n"
