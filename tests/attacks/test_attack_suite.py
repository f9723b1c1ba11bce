"""Traces on disk: kept when they are the same run, refused when they are another, made when they are missing."""

import dataclasses
import os

import pytest

from hf_immunize.attacks import ATTACKS, run_suite
from hf_immunize.errors import RecordError, RunMismatchError
from hf_immunize.records import AttackTrace

QUICK = {"linear_probe_gd": {"steps": (20,), "learning_rate": (1.0, 4.0)}, "ridge_probe": {"penalty": (1e-3,)}}
NAMES = ["linear_probe_gd", "ridge_probe"]


def sit(context, folder, settings=QUICK, seeds=(0, 1), **options):
    return run_suite(context, ATTACKS, NAMES, seeds, folder, settings, **options)


def contents(folder):
    return {path.name: path.read_text() for path in sorted(folder.glob("traces/*/*.json"))}


def test_every_run_leaves_one_valid_trace(make_context, tmp_path):
    context, told = make_context(), []
    summary = sit(context, tmp_path, progress=lambda trace, made: told.append((trace.file_name, made)))
    files = contents(tmp_path)
    assert summary.made == len(files) == len(told) == 2 * 2 + 2 * 2 and summary.kept == 0
    assert sorted(name for name, made in told if made) == sorted(files)
    traces = [AttackTrace.read(path) for path in (tmp_path / "traces/control").iterdir()]
    assert {trace.model.weights["model.safetensors"] for trace in traces} == set(context.fingerprint.weights.values())
    assert all(trace.data == list(context.data) and trace.outcome == "completed" for trace in traces)
    assert {trace.config["attack_fraction"] for trace in traces} == {0.8}


def test_a_second_run_makes_nothing_and_touches_nothing(make_context, tmp_path):
    sit(make_context(), tmp_path)
    before = contents(tmp_path)
    summary = sit(make_context(), tmp_path)
    assert (summary.made, summary.kept) == (0, 8) and contents(tmp_path) == before


def test_only_what_is_missing_is_made_and_it_is_the_same(make_context, tmp_path):
    sit(make_context(), tmp_path)
    lost = sorted((tmp_path / "traces/control").iterdir())[2]
    old = AttackTrace.read(lost)
    lost.unlink()
    summary = sit(make_context(), tmp_path)
    assert (summary.made, summary.kept) == (1, 7)
    assert AttackTrace.read(lost).curve == old.curve


def test_more_seeds_add_runs(make_context, tmp_path):
    sit(make_context(), tmp_path)
    assert sit(make_context(), tmp_path, seeds=(0, 1, 2)).made == 4


@pytest.mark.parametrize("change, what", [
    ({"settings": {**QUICK, "linear_probe_gd": {"steps": (30,), "learning_rate": (1.0, 4.0)}}}, "config"),
    ({"context": {"seed": 5}}, "model"),
    ({"context": {"rows": 66}}, "data"),
    ({"context": {"fraction": 0.5}}, "config"),
])
def test_another_run_of_the_same_name_is_refused_unless_overwritten(make_context, tmp_path, change, what):
    sit(make_context(), tmp_path)
    before = contents(tmp_path)
    context, settings = make_context(**change.get("context", {})), change.get("settings", QUICK)
    with pytest.raises(RunMismatchError, match=f"got another {what} in .*Pass --overwrite to replace it"):
        sit(context, tmp_path, settings)
    assert contents(tmp_path) == before
    assert sit(context, tmp_path, settings, overwrite=True).made == 8


def test_a_truncated_trace_is_refused(make_context, tmp_path):
    sit(make_context(), tmp_path)
    broken = next((tmp_path / "traces/control").iterdir())
    broken.write_text(broken.read_text()[:200])
    with pytest.raises(RecordError, match="expected a AttackTrace in .*make it again"):
        sit(make_context(), tmp_path)


@pytest.mark.parametrize("written", range(0, 12))
def test_a_suite_that_dies_after_any_write_resumes_to_the_same_runs(make_context, tmp_path, monkeypatch, written):
    """Death between two runs, or in the middle of a write: nothing is lost, doubled or changed."""
    whole, seeds = tmp_path / "whole", (0, 1, 2)
    sit(make_context(), whole, seeds=seeds)
    count, replace = [0], os.replace

    def dying(source, target):
        if count[0] == written:
            raise KeyboardInterrupt
        count[0] += 1
        replace(source, target)

    broken = tmp_path / "broken"
    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        sit(make_context(), broken, seeds=seeds)
    monkeypatch.setattr(os, "replace", replace)
    summary = sit(make_context(), broken, seeds=seeds)
    assert (summary.made, summary.kept) == (12 - written, written)
    curves = [{path.name: AttackTrace.read(path).curve for path in folder.glob("traces/control/*.json")}
              for folder in (whole, broken)]
    assert curves[0] == curves[1] and len(curves[0]) == 12


def test_a_model_folder_may_be_renamed(make_context, tmp_path):
    context = make_context()
    sit(context, tmp_path)
    moved = context.folder.with_name("renamed")
    context.folder.rename(moved)
    assert sit(dataclasses.replace(context, folder=moved, _features={}), tmp_path).kept == 8


def test_roles_do_not_share_a_folder(make_context, tmp_path):
    sit(make_context("control"), tmp_path)
    assert sit(make_context("subject"), tmp_path).made == 8
    assert {path.name for path in (tmp_path / "traces").iterdir()} == {"control", "subject"}
