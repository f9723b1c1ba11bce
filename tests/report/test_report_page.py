import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import record_builders as build

from hf_immunize.records import Certificate, ImmunizationRecord, OutcomeRecord
from hf_immunize.report import render_report

VOID = {"meta", "link", "br", "wbr"}
HOSTILE = (
    "<script>window.pwned=1</script>\"'><img src=x onerror=window.pwned=1>"
    "{{7*7}}{% raw %}]]>--><\u202e/style></svg>"
)


class Page(HTMLParser):
    """The page's tags in order and the text of its table cells."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.texts, self.addresses = [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attributes):
        if tag != "wbr":
            self.tags.append((tag, tuple(name for name, _ in attributes)))
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data.strip())

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def page_of(tmp_path, *exams):
    folders = [build.exam_folder(tmp_path, exam) for exam in exams]
    written = render_report(folders, build.base_folder(tmp_path), tmp_path / "report.html")
    assert written == tmp_path / "report.html"
    return written.read_text(encoding="utf-8")


def section(source, heading):
    return re.search(rf'<section[^>]*aria-labelledby="{heading}">.*?</section>', source, re.S).group()


def matrix_cells(source):
    return re.findall(r'<td class="cell c-([a-z-]+)"><span class="chip v-([a-z-]+)">', section(source, "h-verdicts"))


def test_every_cell_stands_in_the_matrix_with_its_verdict_in_text_and_colour(tmp_path):
    second = [replace(attack, verdict="INCONCLUSIVE") for attack in build.ATTACKS]
    source = page_of(tmp_path, build.Exam(), build.Exam(name="other", attacks=second))
    slugs = [
        name for first, other in zip(build.ATTACKS, second, strict=True)
        for name in (first.verdict.lower().replace(" ", "-"), other.verdict.lower())
    ]
    assert matrix_cells(source) == [(slug, slug) for slug in slugs]
    said = Page(section(source, "h-verdicts")).text
    for attack in build.ATTACKS:
        assert attack.verdict in said
    assert "at least 66×" in said and "9× (7.3 to 12)" in said and "88% → 53%" in said


def test_an_attack_that_one_model_lacks_is_not_run_there(tmp_path):
    source = page_of(tmp_path, build.Exam(), build.Exam(name="other", attacks=build.ATTACKS[:1]))
    assert matrix_cells(source)[2:4] == [("resists", "resists"), ("not-run", "not-run")]
    assert "not in this model's exam" in Page(section(source, "h-verdicts")).text


def test_the_page_asks_for_nothing_and_runs_nothing(tmp_path):
    source = page_of(tmp_path, build.Exam(scratch=True))
    page = Page(source)
    assert set(page.addresses) == {"data:,", "#verdicts"}
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, names in page.tags for name in names)
    assert not re.search(r"url\(|@import|https?:", source)
    assert "default-src &#39;none&#39;" in source or "default-src 'none'" in source


def test_the_guards_allowance_stands_with_its_own_metric_and_not_beside_the_exams(tmp_path):
    folder = build.exam_folder(tmp_path)
    record = ImmunizationRecord.read(folder / "immunization.json")
    guard = record.guard.model_copy(update={"metric": "retain loss, -100 ln", "drop": 8.9, "allowed": 9.53})
    record.model_copy(update={"guard": guard}).write(folder / "immunization.json")
    path = render_report([folder], build.base_folder(tmp_path), tmp_path / "report.html")
    said = Page(path.read_text(encoding="utf-8")).text
    assert re.search(r"the guard on retain loss, -100 ln held on its own split \(drop \+8.90, allowed 9.53\)", said)
    assert said.count("9.53") == 1


def test_every_record_of_the_exam_is_said(tmp_path):
    said = Page(page_of(tmp_path, build.Exam(scratch=True))).text
    for expected in (
        "attacks on earlier layers", "RESISTS when the lower bound", "80 % of the accuracy", "2026-07-02",
        "immunization ratio RIR 1,585", "58 of 64", "scikit-learn digits", "3 diverged", "Not part of the preset",
        "+21.5 (+17.0 to +26.2)", "budget 400 steps", "seeds 0, 1, 2", "98.4% → 98.0%", "max_primary_drop",
        "chosen learning_rate=0.1", "+0.4 (+0.2 to +0.7)", "torch 2.9.0",
    ):
        assert expected in said, expected


def test_charts_have_names_and_descriptions(tmp_path):
    source = page_of(tmp_path, build.Exam())
    charts = re.findall(r'<svg [^>]*role="img"[^>]*>.*?</svg>', source, re.S)
    assert len(charts) == 1 + 5 + 2  # utility, five attacks that ran, two spectra
    for chart in charts:
        assert re.search(r'aria-label="[^"]+"', chart) and re.search(r"<desc>[^<]{20,}</desc>", chart)
    curves = next(chart for chart in charts if "under linear probe GD" in chart)
    assert "condition_number: 20% at step 0, 52% at step 2,000, mean of 3 seeds." in curves
    assert curves.count('class="line base"') == curves.count('class="line m1"') == 1
    assert curves.count('class="arrival base"') == 3 and "arrival m1" not in curves


def test_eigenvalues_past_the_rank_are_dimmed(tmp_path):
    assert section(page_of(tmp_path, build.Exam()), "h-spectra").count("line noise") == 4


def test_base_and_scratch_stand_behind_the_models(tmp_path):
    source = page_of(tmp_path, build.Exam(scratch=True))
    assert 'class="line scratch"' in source and "From scratch" in source
    assert "ρ" in Page(section(source, "h-cells")).text
    without = page_of(tmp_path / "b", build.Exam())
    assert "line scratch\"" not in without and "From scratch" not in without


def nothing_ran(name="empty"):
    attacks = [replace(attack, ran=False, verdict="NOT RUN") for attack in build.ATTACKS]
    return build.Exam(name=name, attacks=attacks, immunization=False, spectra=False)


@pytest.mark.parametrize(
    ("exam", "expected"),
    [
        (nothing_ran(), "The certificates hold no spectra"),
        (build.Exam(attacks=()), "Every cell"),
        (build.Exam(immunization=False), "no immunization.json"),
        (build.Exam(seeds=(7,)), "seeds 7"),
        (build.Exam(extra={"not_run": [], "immunization_ratio": None, "immunization_ratio_parts": {}}),
         "The certificate names nothing"),
        (build.Exam(extra={"utility": build.Utility(metric="accuracy", base=98.4, immunized=98.4,
                                                    drop=build.interval(None), rows=450)}), "no figure"),
    ],
    ids=["nothing ran", "no cells", "no immunization", "one seed", "nothing missing", "no drop interval"],
)
def test_thin_evidence_still_makes_a_page(tmp_path, exam, expected):
    assert expected in Page(page_of(tmp_path, exam)).text


def test_a_side_whose_runs_all_diverged_is_no_resistance(tmp_path):
    folder = build.exam_folder(tmp_path)
    certificate = Certificate.read(folder / "certificate.json")
    cells = list(certificate.cells)
    lost = build.Side(trial=None, steps_to_threshold=[], accuracy=[], trials=7, diverged=21)
    cells[0] = cells[0].model_copy(update={
        "subject": lost, "verdict": "INCONCLUSIVE", "slow_down": build.interval(None),
        "accuracy_drop": build.interval(None), "relative_fine_tuning_deviation": build.interval(None),
    })
    certificate.model_copy(update={"cells": cells}).write(folder / "certificate.json")
    source = render_report([folder], build.base_folder(tmp_path), tmp_path / "r.html").read_text()
    assert "all 21 runs diverged: failed tries, not resistance" in Page(source).text
    assert "88% → –" in Page(section(source, "h-verdicts")).text
    assert "21 diverged runs, none chosen" in Page(section(source, "h-cells")).text


def hostile_exam(evil):
    attacks = [replace(build.ATTACKS[0], name=evil[:60], family=evil, reason=evil), *build.ATTACKS[1:]]
    return build.Exam(
        name=evil, attacks=attacks, sources=(evil,), labels=(evil, *"bcde"), statement=evil,
        extra={"rule": evil, "threshold_rule": evil, "not_run": [evil], "expires": evil,
               "provenance": build.PROVENANCE.model_copy(update={"device": evil, "versions": {evil: evil}})},
    )


def test_names_cannot_change_the_page(tmp_path):
    tame = Page(page_of(tmp_path / "tame", hostile_exam("plain")))
    wild = Page(page_of(tmp_path / "wild", hostile_exam(HOSTILE)))
    assert wild.tags == tame.tags
    assert HOSTILE.replace("\u202e", "") in wild.text and "{{7*7}}" in wild.text


def test_a_very_long_name_is_kept_whole_somewhere(tmp_path):
    name = "x" * 300
    said = Page(page_of(tmp_path, build.Exam(extra={"statement": name}))).text
    assert name in said


def test_the_page_says_what_the_trainer_found_of_its_own_work(tmp_path):
    told = "IMMUNIZED: harmful_r_ill 1 -> 0.1; ridge probe on held-out harmful rows 80.0 -> 40.0 % (chance 20.0 %)."
    outcome = OutcomeRecord(
        rows=40, held_out=True, chance=0.2, probe_before=0.8, probe_after=0.4, terms_before={"harmful_r_ill": 1.0},
        terms_after={"harmful_r_ill": 0.1}, immunized=True, told=told,
    )
    folder = build.exam_folder(tmp_path)
    record = ImmunizationRecord.read(folder / "immunization.json")
    record.model_copy(update={"outcome": outcome}).write(folder / "immunization.json")
    source = render_report([folder], build.base_folder(tmp_path), tmp_path / "r.html").read_text()
    assert f"The defender's own look {told}" in Page(source).text
    record.model_copy(update={"outcome": None}).write(folder / "immunization.json")  # of older releases
    source = render_report([folder], build.base_folder(tmp_path), tmp_path / "r.html").read_text()
    assert "The defender's own look" not in Page(source).text


def test_rendering_twice_gives_the_same_bytes(tmp_path):
    folder, base = build.exam_folder(tmp_path), build.base_folder(tmp_path)
    first = render_report([folder], base, tmp_path / "a.html").read_bytes()
    assert first == render_report([folder], base, tmp_path / "b.html").read_bytes()


def test_rendering_rooms_need_no_torch():
    code = ("import sys, hf_immunize.report, hf_immunize.hub; "
            "sys.exit(', '.join({'torch', 'transformers', 'matplotlib'} & set(sys.modules)) or 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
