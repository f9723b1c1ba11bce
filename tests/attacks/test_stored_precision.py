"""A cast is not immunity: the same numbers, stored in half precision, are attacked as in float32."""

from __future__ import annotations

from functools import cached_property

import torch
from transformers import TrainingArguments

from hf_immunize.attacks import ATTACKS, Run
from hf_immunize.attacks.vision._finetune import FinetuneConfig
from hf_immunize.attacks.vision._trainer import training_arguments

ATTACKED = ("full_finetune", "lora", "linear_probe_adam", "reset_last_blocks", "distil_fresh")


def curves(context):
    found = {}
    for name in ATTACKED:
        attack = ATTACKS[name]
        config = attack.config(steps=6) if hasattr(attack.config, "steps") else attack.config()
        for _, result in attack.run(context, [Run(config, "t0", 0)]):
            assert result.outcome == "completed", (name, result.note)
            found[name] = [(point.step, point.validation, point.test) for point in result.curve]
    return found


def test_a_half_precision_copy_has_the_curves_of_its_numbers_in_float32(make_context, make_vit):
    stored = make_vit(labels=4, layers=3).half()
    half = make_context(model=stored, seed=1)
    whole = make_context(model=make_vit(labels=4, layers=3).half().float(), seed=2)
    assert half._saved.dtype == whole._saved.dtype == torch.float32
    assert curves(half) == curves(whole)


def test_scratch_is_float32_whatever_the_subject_is_stored_in(make_context, make_vit):
    context = make_context(role="scratch", model=make_vit(labels=4).half(), seed=3)
    assert {parameter.dtype for parameter in context.model_with_new_head(0).parameters()} == {torch.float32}


def test_several_visible_gpus_do_not_multiply_the_attackers_batch(monkeypatch, tmp_path):
    @cached_property
    def four_gpus(self):
        self._n_gpu = 4
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", four_gpus)
    four_gpus.__set_name__(TrainingArguments, "_setup_devices")
    assert TrainingArguments(str(tmp_path), per_device_train_batch_size=8, report_to="none").train_batch_size == 32
    found = training_arguments(FinetuneConfig(batch_size=8), 0, "cuda", str(tmp_path))
    assert found.n_gpu == 1 and found.train_batch_size == 8
