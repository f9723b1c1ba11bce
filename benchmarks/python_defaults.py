"""A classifier that knows ImageNet, its user's data, and no option but the objective and the steps: does it work?

    python benchmarks/vision_data.py --tiny_imagenet <zip> --stanford_cars <zip>
    python benchmarks/python_defaults.py --model_name_or_path <folder of MobileNetV2> --objectives closed_form_adversary

50 classes of Tiny-ImageNet stay (35 images each, 15 more to evaluate on), 12 of Stanford Cars are harmful, with 20
photos each for the defender. A head for the 50 classes is trained first. Then ``ImmunizationConfig(folder,
objective=..., max_steps=...)``, and ``max_primary_drop=1`` unless ``--unguarded``. The judge is a ridge probe that is
no part of the package, on car photos that training has not seen: fitted on 12 of each class, the best of twelve
penalties on 9 others. Prints a row for each objective.
"""

from __future__ import annotations

import argparse
import copy
import io
import tempfile
from typing import Any

import numpy
import torch
import yaml
from PIL import Image
from pyarrow import parquet
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, PrinterCallback, set_seed

from hf_immunize import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.features import capture_inputs, find_classifier

MEAN, STD = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class Images(Dataset[Any]):
    """Images of some classes, numbered from 0, so many of each from a place on."""

    def __init__(self, images: dict[int, list[Tensor]], first: int, last: int):
        self.rows = [(image, label) for label, name in enumerate(sorted(images)) for image in images[name][first:last]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"pixel_values": self.rows[row][0], "labels": self.rows[row][1]}

    @property
    def labels(self) -> Tensor:
        """Of all rows."""
        return torch.tensor([label for _, label in self.rows])


def load(path: str, classes: range, most: int, size: int) -> dict[int, list[Tensor]]:
    """The first images of each of some classes, cropped to squares."""
    table, found = parquet.read_table(path).to_pydict(), {}
    for stored, label in zip(table["image"], table["label"], strict=True):
        if label in classes and len(found.setdefault(label, [])) < most:
            image = Image.open(io.BytesIO(stored["bytes"])).convert("RGB")
            scale = size / min(image.size)
            image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
            left, top = ((side - size) // 2 for side in image.size)
            pixels = torch.from_numpy(numpy.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1)
            found[label].append((pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])
    return found


@torch.no_grad()
def features(model: nn.Module, images: Images) -> Tensor:
    """What the head reads, in evaluation mode."""
    model.eval()
    head, parts = find_classifier(model), []
    for start in range(0, len(images), 32):
        with capture_inputs(model, [head]) as caught:
            model(pixel_values=torch.stack([image for image, _ in images.rows[start : start + 32]]))
        parts.append(caught[head])
    return torch.cat(parts)


def accuracy(model: nn.Module, images: Images) -> float:
    """Of the model's own head, in percent."""
    answers = model.get_submodule(find_classifier(model))(features(model, images)).argmax(1)
    return 100 * (answers == images.labels).double().mean().item()


def ridge(model: nn.Module, fitted: Images, judged: Images) -> float:
    """The best of twelve ridge probes, in percent."""
    here, there = features(model, fitted).double(), features(model, judged).double()
    mean = here.mean(0)
    here, there, targets = here - mean, there - mean, nn.functional.one_hot(fitted.labels).double()
    targets -= targets.mean(0)
    gram, best = here @ here.T, 0.0
    for power in range(-8, 4):
        penalty = 10.0**power * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        answers = (there @ (here.T @ torch.linalg.solve(gram + penalty, targets))).argmax(1)
        best = max(best, (answers == judged.labels).double().mean().item())
    return 100 * best


def with_head(source: str, rows: Images) -> nn.Module:
    """The backbone with a head of its own for the classes that stay."""
    set_seed(0)
    model: nn.Module = AutoModelForImageClassification.from_pretrained(
        source, num_labels=int(rows.labels.max()) + 1, ignore_mismatched_sizes=True, use_safetensors=True,
        dtype=torch.float32,
    )
    seen, head = features(model, rows), model.get_submodule(find_classifier(model))
    optimizer = torch.optim.AdamW(head.parameters(), 3e-3)
    for _ in range(60):
        for chosen in torch.randperm(len(seen)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(seen[chosen]), rows.labels[chosen]).backward()
            optimizer.step()
    return model


def main() -> None:
    """Head, immunization, probe; a row for each objective."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--data", default="runs/vision-data")
    parser.add_argument("--objectives", nargs="+", default=["closed_form_adversary", "group_kappa", "condition_number"])
    parser.add_argument("--max_steps", type=int, default=40)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--unguarded", action="store_true")
    parser.add_argument("--options", nargs="*", default=[], help="Others than the defaults, name=value, to compare.")
    given = parser.parse_args()
    keep = load(f"{given.data}/tiny_imagenet.parquet", range(0, 200, 4), 50, given.size)
    cars = load(f"{given.data}/stanford_cars.parquet", range(0, 60, 5), 41, given.size)
    kept, evaluated, defence = Images(keep, 0, 35), Images(keep, 35, 50), Images(cars, 0, 20)
    attacker = Images(cars, 20, 32), Images(cars, 32, 41)
    base = with_head(given.model_name_or_path, kept)
    print("| objective, steps | the trainer's line | probe on unseen cars | accuracy on what stays |")
    print("|---|---|---|---|")
    print(f"| base | | {ridge(base, *attacker):.1f} % | {accuracy(base, evaluated):.1f} % |", flush=True)
    for objective in given.objectives:
        model = copy.deepcopy(base)
        with tempfile.TemporaryDirectory() as folder:
            args = ImmunizationConfig(
                folder, objective=objective, max_steps=given.max_steps, report_to="none", save_strategy="no",
                max_primary_drop=None if given.unguarded else 1.0, disable_tqdm=True, logging_strategy="no",
                **{name: yaml.safe_load(value) for name, _, value in (one.partition("=") for one in given.options)},
            )
            trainer = ImmunizationTrainer(
                model=model, args=args, train_dataset=kept, harmful_dataset=defence, eval_dataset=evaluated
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        told = "NOT MEASURED" if trainer.outcome is None else trainer.outcome.told.partition(":")[0]
        print(f"| {objective}, {given.max_steps} | {told} | {ridge(model, *attacker):.1f} % "
              f"| {accuracy(model, evaluated):.1f} % |", flush=True)


if __name__ == "__main__":
    main()
