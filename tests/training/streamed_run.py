"""A few steps on streams, on any number of processes: ``python streamed_run.py OUTPUT PROCESSES``."""

import sys
import tempfile

import torch
from launching import leave
from safetensors.torch import save_file
from torch.utils.data import Dataset, IterableDataset
from transformers import ViTConfig, ViTForImageClassification

from hf_immunize.data import digest_rows
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.training.vision.counting import count_labels, digest_once

torch.set_num_threads(1)
output, processes = sys.argv[1], int(sys.argv[2])


class Stream(IterableDataset):
    """Forty rows in one order."""

    def __init__(self, seed: int):
        self.seed = seed

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        for number in range(40):
            pixels = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64) + number % 3
            yield {"pixel_values": pixels, "labels": number % 3}


class Counted(Dataset):
    """Rows of which nobody knows the labels; how many were read."""

    read = 0

    def __len__(self) -> int:
        return 60

    def __getitem__(self, row: int) -> dict:
        self.read += 1
        return {"labels": row % 3, "pixel_values": torch.full((3, 2, 2), float(row))}


torch.manual_seed(0)
config = ViTConfig(
    image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)
model = ViTForImageClassification(config).double()
args = ImmunizationConfig(
    tempfile.mkdtemp(), max_steps=3, per_device_train_batch_size=12 // processes, gradient_accumulation_steps=2,
    per_device_harmful_batch_size=18 // processes, report_to="none", use_cpu=True, disable_tqdm=True,
    save_strategy="no", objective="closed_form_adversary+condition_number", optim="sgd", learning_rate=0.1,
)
trainer = ImmunizationTrainer(model, args, train_dataset=Stream(0), harmful_dataset=Stream(1))
trainer.train()
counted = Counted()
labels = count_labels(counted, "labels", "harmful_dataset").values
assert digest_once(counted, "harmful_dataset") == digest_rows([counted[row] for row in range(60)], "harmful_dataset")
counted.read -= 60
save_file({"labels": labels, "read": torch.tensor(counted.read)}, f"{output}-counted-{args.process_index}")
if args.process_index == 0:
    save_file({name: value.clone() for name, value in model.state_dict().items()}, output)
leave()
