"""Small classifiers of many families that nobody tuned anything for, and no option but the objective and the steps.

    MNIST_NPZ=<mnist.npz> python benchmarks/small_networks.py --families vit resnet convnext --max_steps 40

Each network is trained from random weights on the MNIST digits 0-4; 5-9 are harmful. Then ``ImmunizationConfig(folder,
objective=..., max_steps=...)`` and ``max_primary_drop=1`` unless ``--unguarded``. The judge is the ridge probe of
python_defaults.py on digits that training has not seen. Prints a row for each network.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from typing import Any

import numpy
import torch
import transformers
import yaml
from python_defaults import Images, accuracy, ridge
from torch import nn
from transformers import PrinterCallback, set_seed

from hf_immunize import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.data.builders import mnist

SIZE = 32
_SEEN = {"image_size": SIZE, "num_channels": 1}
_TOKENS = {**_SEEN, "patch_size": 4, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", {**_TOKENS, "intermediate_size": 96}),
    "deit": ("DeiT", {**_TOKENS, "intermediate_size": 96}),
    "dinov2": ("Dinov2", {**_TOKENS, "mlp_ratio": 2}),
    "resnet": ("ResNet", {"num_channels": 1, "embedding_size": 16, "hidden_sizes": [16, 32, 64],
                                "depths": [1, 1, 1], "layer_type": "basic"}),
    "convnext": ("ConvNext", {**_SEEN, "patch_size": 2, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 2],
                                    "num_stages": 3}),
    "swin": ("Swin", {**_SEEN, "patch_size": 2, "embed_dim": 24, "depths": [1, 1, 1], "num_heads": [2, 4, 4],
                            "window_size": 4}),
    "mobilenet_v2": ("MobileNetV2", {**_SEEN, "depth_multiplier": 0.35, "classifier_dropout_prob": 0.1}),
    "regnet": ("RegNet", {"num_channels": 1, "embedding_size": 16, "hidden_sizes": [16, 32, 64],
                                "depths": [1, 1, 1], "groups_width": 8}),
    "poolformer": ("PoolFormer", {"num_channels": 1, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}),
}


def digits(seed: int = 0) -> dict[str, Images]:
    """MNIST in five parts: what stays (to train, to evaluate), the defender's harmful rows, the attacker's two."""
    table = mnist()
    pixels = torch.from_numpy(numpy.stack([numpy.asarray(image) for image in table["image"]])).float() / 255
    pixels = nn.functional.pad(pixels[:, None], (2, 2, 2, 2)) - 0.13
    labels, rows = torch.tensor(table["label"]), {}
    for digit in range(10):
        found = (labels == digit).nonzero().flatten()
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed + digit))
        rows[digit] = list(pixels[found[order]])
    keep, harm = ({digit: rows[digit] for digit in some} for some in (range(5), range(5, 10)))
    return {"train": Images(keep, 0, 300), "evaluate": Images(keep, 300, 500), "defence": Images(harm, 0, 150),
            "fitted": Images(harm, 150, 250), "judged": Images(harm, 250, 500)}


def trained(family: str, rows: Images, epochs: int) -> nn.Module:
    """A network of a family, from random weights."""
    name, options = FAMILIES[family]
    set_seed(0)
    config = getattr(transformers, f"{name}Config")(num_labels=5, **options)
    model: nn.Module = getattr(transformers, f"{name}ForImageClassification")(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    pixels = torch.stack([image for image, _ in rows.rows])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * (len(pixels) // 50))
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(pixels)).split(50):
            optimizer.zero_grad()
            logits = model(pixel_values=pixels[chosen]).logits
            nn.functional.cross_entropy(logits, rows.labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    """Base, immunization, probe; a row for each network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--objective", default="closed_form_adversary")
    parser.add_argument("--max_steps", type=int, nargs="+", default=[40])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--unguarded", action="store_true")
    parser.add_argument("--options", nargs="*", default=[], help="Others than the defaults, name=value, to compare.")
    given = parser.parse_args()
    rows = digits()
    print("| network, steps | the trainer's line | probe on unseen digits 5-9 | accuracy on 0-4 |\n|---|---|---|---|")
    for family in given.families:
        base = trained(family, rows["train"], given.epochs)
        for steps in given.max_steps:
            model = copy.deepcopy(base)
            before = ridge(model, rows["fitted"], rows["judged"]), accuracy(model, rows["evaluate"])
            with tempfile.TemporaryDirectory() as folder:
                args = ImmunizationConfig(
                    folder, objective=given.objective, max_steps=steps, report_to="none", save_strategy="no",
                    max_primary_drop=None if given.unguarded else 1.0, disable_tqdm=True, logging_strategy="no",
                    **{name: yaml.safe_load(value) for name, _, value in (one.partition("=") for one in given.options)},
                )
                trainer = ImmunizationTrainer(
                    model=model, args=args, train_dataset=rows["train"], harmful_dataset=rows["defence"],
                    eval_dataset=rows["evaluate"],
                )
                trainer.remove_callback(PrinterCallback)
                trainer.train()
            told = "NOT MEASURED" if trainer.outcome is None else trainer.outcome.told.partition(":")[0]
            after = ridge(model, rows["fitted"], rows["judged"]), accuracy(model, rows["evaluate"])
            print(f"| {family}, {steps} | {told} | {before[0]:.1f} -> {after[0]:.1f} % "
                  f"| {before[1]:.1f} -> {after[1]:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
