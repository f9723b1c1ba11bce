"""What fine-tuning of a small ViT reaches when something that is nothing to its function was planted in its weights.

A ViT learns the real digits 0-4 (400 steps), gets the change, and is attacked with 64 rows of the digits 5-9 at four
rates: the best test accuracy over rates, mean over seeds. 40 seconds a line of 6 seeds on one core.

    python benchmarks/coordinates.py [SEEDS] [STEPS] [BEGINNING OF THE LINES WANTED]
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessorPil

from hf_immunize.attacks import ATTACKS, AttackContext, Run
from hf_immunize.data import Task, TaskArguments, fingerprint

ROWS, RATES = 64, (1e-5, 1e-4, 1e-3, 1e-2)
RECIPE = Path(__file__).parents[1] / "recipes" / "digits-vit" / "vit"


def trained(task, processor):
    """The base: digits 0-4."""
    torch.manual_seed(1)
    names = dict(enumerate("01234"))
    config = AutoConfig.from_pretrained(
        RECIPE, image_size=8, patch_size=2, id2label=names, label2id={name: place for place, name in names.items()}
    )
    rows, model = task.pixels("train", processor), AutoModelForImageClassification.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(400):
        chosen = torch.randperm(len(rows))[:64]
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 400)
        optimizer.zero_grad()
        model(pixel_values=rows.pixel_values[chosen], labels=rows.labels[chosen]).loss.backward()
        optimizer.step()
    return model.eval()


def writers(model):
    """Maps that write the residual stream, tokens and positions that start it, and who reads each norm."""
    embeddings, blocks = model.vit.embeddings, model.vit.layers
    maps = [embeddings.patch_embeddings.projection]
    maps += [layer for block in blocks for layer in (block.attention.o_proj, block.mlp.fc2)]
    readers = [(model.vit.layernorm, [model.classifier])]
    for block in blocks:
        found = block.attention
        readers += [(block.layernorm_before, [found.q_proj, found.k_proj, found.v_proj])]
        readers += [(block.layernorm_after, [block.mlp.fc1])]
    return maps, [embeddings.cls_token, embeddings.position_embeddings], readers


def with_means(model, size):
    """Columns of all writers + size × their deviation × N(0, 1), the same in every channel."""
    maps, tables, _ = writers(model)
    for layer in maps:
        deviation = size * layer.weight.std()
        layer.weight.add_(deviation * torch.randn(1, *layer.weight.shape[1:]))
        layer.bias.add_(deviation * torch.randn(1))
    for table in tables:
        table.add_(size * table.std() * torch.randn(*table.shape[:-1], 1))


def with_sums(model, size):
    """Readers of layer norms + a large multiple of a sum that is zero."""
    for norm, layers in writers(model)[2]:
        for layer in layers:
            by = size * layer.weight.std() * torch.randn(len(layer.weight))
            layer.weight.add_(by[:, None] / norm.weight)
            layer.bias.sub_(by * (norm.bias / norm.weight).sum())


def with_twins(model, size):
    """Two hidden units of every block are one, and what they add is large and opposite."""
    for block in model.vit.layers:
        first, second = block.mlp.fc1, block.mlp.fc2
        first.weight[1], first.bias[1], second.weight[:, 1] = first.weight[0], first.bias[0], 0
        direction = size * torch.linspace(-1, 1, len(second.weight))
        second.weight[:, 0] += direction
        second.weight[:, 1] -= direction


def rotated(model, size):
    """Gains folded; where ``size`` is 1, a random rotation of the stream that leaves its mean over channels."""
    maps, tables, readers = writers(model)
    width = len(maps[0].weight)
    one = torch.full((width, 1), width**-0.5, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([one, torch.randn(width, width - 1, dtype=torch.float64)], dim=1))[0][:, 1:]
    inner = torch.linalg.qr(torch.randn(width - 1, width - 1, dtype=torch.float64))[0]
    turn = (one @ one.T + basis @ inner @ basis.T if size else torch.eye(width, dtype=torch.float64)).float()
    for norm, layers in readers:
        for layer in layers:
            layer.bias.add_(layer.weight @ norm.bias)
            layer.weight.copy_((layer.weight * norm.weight) @ turn.T)
        nn.init.ones_(norm.weight), nn.init.zeros_(norm.bias)
    for layer in maps:
        layer.weight.copy_((turn @ layer.weight.flatten(1)).view_as(layer.weight)), layer.bias.copy_(turn @ layer.bias)
    for table in tables:
        table.copy_(table @ turn.T)


CHANGES = [
    ("plain", with_means, 0.0), ("means × 100", with_means, 1e2), ("means × 1000", with_means, 1e3),
    ("sums × 100", with_sums, 1e2), ("sums × 1000", with_sums, 1e3), ("a unit less per block", with_twins, 0.0),
    ("twins ± 10", with_twins, 10.0), ("twins ± 1000", with_twins, 1e3), ("gains folded", rotated, 0.0),
    ("gains folded, stream rotated", rotated, 1.0),
]  # fmt: skip


def main(seeds: str = "6", steps: str = "40", wanted: str = "") -> None:
    """Print the table."""
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    named = {"primary_labels": "0,1,2,3,4", "harmful_labels": "5,6,7,8,9"}
    arguments = TaskArguments("builder:digits", "builder:digits", **named)
    base, harmful = trained(Task(arguments, "primary"), processor), Task(arguments, "harmful")
    splits = {role: harmful.pixels(role, processor) for role in ("attack", "validation", "test")}
    splits["attack"] = splits["attack"].subset(torch.arange(ROWS))
    prints = tuple(fingerprint(split, source="digits", role=role) for role, split in splits.items())
    for label, change, size in (line for line in CHANGES if line[0].startswith(wanted)):
        model, folder = copy.deepcopy(base), Path(tempfile.mkdtemp())
        torch.manual_seed(3)
        with torch.no_grad():
            change(model, size)
        model.save_pretrained(folder)
        context = AttackContext(folder=folder, role="subject", data=prints, attack_fraction=0.8, **splits)
        for name in ("full_finetune", "canonical_finetune"):
            best = [max(reached(context, name, rate, int(steps), seed) for rate in RATES) for seed in range(int(seeds))]
            error = torch.tensor(best).std() / len(best) ** 0.5
            print(f"{label:30s} {name:20s} {sum(best) / len(best):.3f} ± {error:.3f}", flush=True)


def reached(context, name: str, rate: float, steps: int, seed: int) -> float:
    """Best test accuracy of one run; 0 where the attack is not applicable."""
    ((_, result),) = ATTACKS[name].run(context, [Run(ATTACKS[name].config(learning_rate=rate, steps=steps), "x", seed)])
    return max((point.test for point in result.curve), default=0.0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
