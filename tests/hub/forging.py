"""An honest exam in a folder that lies are told about, and what keeps a campaign of them cheap."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import contextmanager

from hf_immunize.certification import Evidence, judge, judge_traces
from hf_immunize.errors import IncompleteExamError
from hf_immunize.hub import evidence, verify_folder
from hf_immunize.records import AttackTrace, Certificate


@contextmanager
def remembering(monkeypatch):
    """Parse the same bytes once, and judge the same runs of an attack by the same rule once, over all lies.

    Both are functions of what they are given; what a lie changes is parsed and judged as ever.
    """
    parse, build, parsed, cells = evidence.parse_record, judge.build_cell, {}, {}

    def parse_once(kind, data):
        key = (kind, hashlib.sha256(data).digest())
        if key not in parsed:
            parsed[key] = parse(kind, data)
        return parsed[key]

    def build_once(name, about, traces, threshold, test_rows, rule, anyway=None):
        runs = tuple((role, tuple(map(id, found))) for role, found in sorted(traces.items()))
        key = (name, about.family, about.unit, runs, threshold, test_rows, rule.model_dump_json(), repr(anyway))
        if key not in cells:  # the runs are held, so that no other object takes their place
            cells[key] = build(name, about, traces, threshold, test_rows, rule, anyway), traces
        return cells[key][0]

    monkeypatch.setattr(evidence, "parse_record", parse_once)
    monkeypatch.setattr(judge, "build_cell", build_once)
    yield


class Exam:
    """The honest exam in a folder, which a lie may change and which is restored afterwards."""

    def __init__(self, folder):
        self.folder = folder
        self.honest = json.loads((folder / "certificate.json").read_text())

    @property
    def certificate(self):
        return Certificate.model_validate(self.honest)

    def traces(self):
        return {name: evidence.parse_record(AttackTrace, (self.folder / name).read_bytes())
                for name in self.honest["traces"]}

    @contextmanager
    def told(self, forged, files=None):
        """The folder with this certificate, and with these files in place of its own (None: gone)."""
        paths = {name: self.folder / name for name in {*(files or {}), "certificate.json"}}
        kept = {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}
        try:
            for name, data in (files or {}).items():
                if data is None:
                    (self.folder / name).unlink()
                else:
                    (self.folder / name).parent.mkdir(exist_ok=True)
                    (self.folder / name).write_bytes(data)
            (self.folder / "certificate.json").write_text(json.dumps(forged))
            yield
        finally:
            for name, data in kept.items():
                if data is None:
                    paths[name].unlink(missing_ok=True)
                else:
                    paths[name].write_bytes(data)

    def unsound(self, forged, files=None):
        """What ``--rejudge`` has against it."""
        with self.told(forged, files):
            return [item.message for item in verify_folder(self.folder, rejudge=True).findings if item.level == "fail"]

    def judged(
        self, change_trace=lambda trace: trace, *, plan=None, rule=None, keep=lambda trace: True, more=None,
        renamed=False, **given,
    ):
        """Certificate and files of a liar who changes what the judge is given and lets it judge.

        Args:
            more: further runs by name of their file.
            renamed: whether changed runs may get other names than they had.
        """
        certificate = self.certificate
        files, traces, hashes = {}, {}, {}
        for name, trace in (more or {}).items():
            files[name] = trace.dumps().encode()
            hashes[name] = sha256_of(files[name])
            traces.setdefault(trace.role, []).append(trace)
        for name, trace in self.traces().items():
            if not keep(trace):
                files[name] = None
                continue
            changed = change_trace(trace)
            if changed is trace:
                hashes[name] = self.honest["traces"][name]
            else:
                if renamed:
                    files.setdefault(name, None)
                    name = f"traces/{changed.role}/{changed.file_name}"
                files[name] = changed.dumps().encode()
                hashes[name] = sha256_of(files[name])
            traces.setdefault(trace.role, []).append(changed)
        given_ = dataclasses.replace(Evidence.of_certificate(certificate), traces=hashes, **given)
        plan, rule = plan or certificate.plan, rule or certificate.judged_by
        try:
            made = judge_traces(traces, plan, rule, given_)
        except IncompleteExamError as error:  # the honest judge wants other runs: effort is said to follow nothing
            if "effort follows the base" not in str(error) or plan.adaptation is None:
                raise
            made = judge_traces(traces, plan.model_copy(update={"adaptation": None}), rule, given_)
        return made.model_dump(mode="json"), files


def sha256_of(data):
    return hashlib.sha256(data).hexdigest()
