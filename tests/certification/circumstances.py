"""Tiny honest exams under many circumstances, each with its bench: what no recheck may accuse."""

from __future__ import annotations

import multiprocessing
import shutil

import torch
from peft import LoraConfig, get_peft_model
from tiny_exam import SETTINGS, blobs
from transformers import AutoModelForImageClassification

from hf_immunize.attacks import ATTACKS, AttackContext, run_suite
from hf_immunize.certification import build_certificate
from hf_immunize.certification.bench import Bench
from hf_immunize.exam import Protocol
from hf_immunize.exam.means import Means

STEPS = {"full_finetune": {"steps": (12,), "learning_rate": (1e-2,)}}
LORA = {"lora": {"steps": (8,), "learning_rate": (1e-3, 1e-1), "rank": (2,)}}
DOES_NOT_APPLY = {"batchnorm_probe": {"penalty": (1e-3,)}}


class Blobs:
    """A task whose harmful and benign rows are blobs."""

    source, label_names, sides = "blobs", ["class 0", "class 1"], ("primary", "harmful", "benign")

    def __init__(self, exam_data):
        self.data, self.splits = exam_data
        self.benign = blobs(30, 9, 3)

    def examples(self, side, split):
        return self.splits[split]

    def fingerprint(self, side, split):
        return dict(zip(("attack", "validation", "test"), self.data.harmful, strict=True))[split]

    def attacker_knows(self, side):
        return {"benign": self.benign}

    def described(self):
        return {}


def attack(
    folder, role, base, exam_data, settings, *, seeds, fraction, base_held, benign, module, tuning, trials, means
):
    """One side of an exam."""
    data, splits = exam_data
    context = AttackContext(
        folder=folder, role=role, data=data.harmful, attack_fraction=fraction, benign=benign, feature_module=module,
        base=base if base_held else None, adapter_base=base, means=means or Means(), **splits)
    run_suite(context, ATTACKS, list(settings), seeds, folder, settings, tuning_seeds=tuning, trials=trials)


def sit(root, source, exam_data, settings, *, seeds=(0, 1, 2), fraction=0.8, base_held=False, benign=None,
        module=None, tuning=None, halves=False, trials=None, means=None, adapted=False, processes=1):
    """An exam of ``source`` against itself under these circumstances, certified; the folder and its bench.

    Args:
        halves: one seed first, as if the run had been interrupted.
        adapted: the subject is a PEFT adapter with random updates.
        processes: how many share the runs.
    """
    data = exam_data[0]
    base, subject = root / "base", root / "subject"
    shutil.copytree(source, base, ignore=shutil.ignore_patterns("traces"))
    if adapted:
        save_adapter(base, subject)
    else:
        shutil.copytree(source, subject, ignore=shutil.ignore_patterns("traces"))
    told = {"fraction": fraction, "base_held": base_held, "benign": benign, "module": module, "tuning": tuning,
            "trials": trials, "means": means}
    for folder, role in ((subject, "subject"), (base, "control")):
        for part in ([seeds[:1], seeds] if halves else [seeds]):
            _shared(processes, attack, folder, role, base, exam_data, settings, **told, seeds=part)
    protocol = Protocol(attacks=tuple(settings), seeds=tuple(seeds))
    with_reference = "ridge_probe" in settings
    build_certificate(subject, base, data, protocol, threshold=None if with_reference else 0.6).write(
        subject / "certificate.json")
    return subject, Bench(subject, base, Blobs(exam_data))


def save_adapter(base, folder, spread=0.1):
    """A LoRA adapter whose updates are random, and nothing else; no processor, no pickle."""
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForImageClassification.from_pretrained(base), LoraConfig(
        r=2, target_modules=".*(q_proj|v_proj|query|value)", modules_to_save=["classifier"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=spread)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def _shared(processes, work, *words, **told):
    """The same work in several processes, which share what is to be done."""
    if processes == 1:
        return work(*words, **told)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=words, kwargs=told) for _ in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * processes


CIRCUMSTANCES = {
    "as usual": (SETTINGS, {}),
    "a tenth of the rows": (SETTINGS, {"fraction": 0.1}),
    "all rows": (SETTINGS, {"fraction": 1.0}),
    "a named module": (SETTINGS, {"module": "classifier"}),
    "LoRA alone": (LORA, {}),
    "an attack that does not apply": ({**DOES_NOT_APPLY, **STEPS}, {}),
    "attackers who hold the base": ({"subtract_difference": {"steps": (6,), "learning_rate": (1e-3,)}, **STEPS},
                                    {"base_held": True}),
    "attackers who do not": ({"subtract_difference": {"steps": (6,), "learning_rate": (1e-3,)}, **STEPS}, {}),
    "benign rows mixed in": ({"mixed_finetune": {"steps": (6,), "learning_rate": (1e-3,)}, **STEPS},
                             {"benign": blobs(30, 9, 3)}),
    "interrupted and taken up again": (SETTINGS, {"halves": True}),
    "one seed": (SETTINGS, {"seeds": (0,)}),
    "networks trained in bfloat16, some rows at a time": (STEPS, {"means": Means("bf16", 5), "seeds": (0, 1)}),
    "trials compared on one seed": (LORA, {"tuning": 1}),
    "an adapter": ({**LORA, "ridge_probe": SETTINGS["ridge_probe"]}, {"adapted": True}),
    "two processes": (SETTINGS, {"processes": 2}),
}
