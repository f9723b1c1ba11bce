"""Which checkpoint a run can continue from, and what identifies a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

_MARK = "trainer_state.json"
_OPERATIONAL = re.compile(
    r"^(output_dir|run_name|feature_cache_dir|hub_.*|push_to_hub|resume_from_checkpoint|logging_(?!nan).*|log_.*|report_to|save_.*|"
    r"probe_steps|disable_tqdm|dataloader_.*|local_rank|ddp_.*|deepspeed|fsdp.*|accelerator_config|_n_gpu|project|trackio.*|"
    r"do_.*|eval_on_start|skip_memory_metrics|ignore_data_skip|restore_.*|enable_jit_.*|parallelism_config|"
    r"attacker_lora_.*|distributed_config|debug|prediction_loss_only|include_.*|remove_unused_columns|label_names|use_cpu)$"
)


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest ``checkpoint-N`` whose Trainer state, which is written last, can be read; None without one."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and _is_complete(path):
            found.append((int(number), str(path)))
    return max(found)[1] if found else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def scientific_options(args: TrainingArguments) -> dict[str, Any]:
    """The training arguments that can change the result: no paths, tokens, logging or hardware options."""
    return {name: value for name, value in args.to_dict().items() if not _OPERATIONAL.match(name)}
