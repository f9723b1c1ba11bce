"""Immunize a diffusion pipeline against learning a concept, and write down how.

    accelerate launch recipes/immunize_diffusion.py --config recipes/mnist-diffusion/smoke/task.yaml \
        --config recipes/mnist-diffusion/smoke/simulated_attack.yaml
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from hf_immunize.diffusion import (
    LatentDataset,
    component_of,
    decode,
    denoiser_of,
    draw_latents,
    grid_png,
    load_pipeline,
)
from hf_immunize.diffusion.tasks import ConceptArguments, ConceptTask
from hf_immunize.errors import ImmunizeError
from hf_immunize.options import parse_options
from hf_immunize.records import (
    ImmunizationRecord,
    ModelFingerprint,
    Provenance,
    atomic_write,
    begin_run,
    fingerprint_of,
    finish_run,
    weight_files,
)
from hf_immunize.training.diffusion import DiffusionImmunizationConfig, DiffusionImmunizationTrainer
from hf_immunize.training.diffusion.config import scientific_options
from hf_immunize.training.vision.checkpoints import last_complete_checkpoint


@dataclass
class BaseArguments:
    """Which pipeline to immunize."""

    base_path: str = field(metadata={"help": "Folder of the pipeline to immunize (theta_0)."})


def fingerprint(folder: str, model) -> ModelFingerprint:
    return ModelFingerprint.of_folder(
        folder, name=Path(folder).name, architecture=type(model).__name__, parameters=model.num_parameters()
    )


def painter(pipeline, splits: dict[str, LatentDataset], folder: Path, batch_size: int):
    """Draws retained classes and the concept from one seed into ``validation/step-N.png``."""
    denoiser = denoiser_of(getattr(pipeline, component_of(pipeline)))
    shown = [held.batch(torch.arange(8) * (len(held) // 8)) for held in
             (splits["retain validation"], splits["harmful defense"])]

    def paint(model, step: int) -> None:
        drawn = [
            draw_latents(
                denoiser, model, pipeline.scheduler, batch.conditions, batch.latents.shape, batch_size=batch_size
            )
            for batch in shown
        ]
        pixels = decode(torch.cat(drawn), getattr(pipeline, "vae", None))
        atomic_write(folder / "validation" / f"step-{step}.png", grid_png(pixels, 8))

    return paint


def immunize(pipeline, splits: dict[str, LatentDataset], source: str, task: dict, base_path: str,
             args: DiffusionImmunizationConfig) -> None:
    """Train on ``retain train`` and ``harmful defense``, guard on ``retain validation``, save pipeline and record."""
    model = getattr(pipeline, component_of(pipeline))
    base = fingerprint(base_path, model)
    data = [held.fingerprint(source=source, role=name) for name, held in splits.items()]
    inputs = {
        "base": base.weights,
        "task": task,
        "data": {found.role: found.sha256 for found in data},
        "options": scientific_options(args),
    }
    trainer = DiffusionImmunizationTrainer(
        model, pipeline.scheduler, args, train_dataset=splits["retain train"],
        harmful_dataset=splits["harmful defense"], eval_dataset=splits["retain validation"],
        validate=painter(pipeline, splits, Path(args.output_dir), args.eval_batch_size),
    )
    main_process = trainer.accelerator.is_main_process
    if begin_run(args.output_dir, "immunize_diffusion", inputs, write=main_process):
        print(f"{args.output_dir}: already immunized, nothing to do")
        return
    start = time.perf_counter()
    trainer.train(last_complete_checkpoint(args.output_dir))
    released = trainer.whole_model()  # of all processes where weights are split over them
    if main_process:
        setattr(pipeline, component_of(pipeline), released)
        pipeline.to("cpu").save_pretrained(args.output_dir)
        leave_record(trainer, released, base, data, inputs, time.perf_counter() - start)


def leave_record(trainer, released, base: ModelFingerprint, data: list, inputs: dict, seconds: float) -> None:
    """immunization.json, no checkpoints any more, and the mark that the run is finished."""
    args, guard = trainer.args, trainer.guard_record
    ImmunizationRecord(
        model=fingerprint(args.output_dir, released), base=base, config=scientific_options(args),
        fingerprint=fingerprint_of(inputs), seeds={"seed": args.seed}, data=data, spectra={}, guard=guard,
        steps=trainer.step, seconds=seconds, provenance=Provenance.here(str(trainer.accelerator.device)),
    ).write(Path(args.output_dir) / "immunization.json")
    for checkpoint in Path(args.output_dir).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    weights = [path.relative_to(args.output_dir).as_posix() for path in weight_files(args.output_dir)]
    finish_run(args.output_dir, "immunize_diffusion", inputs, [*weights, "model_index.json", "immunization.json"])
    print(
        f"{Path(args.output_dir).name}: retain denoising loss {guard.drop:+.2f} (100 ln of its factor), weights of "
        f"step {guard.returned_step} of {trainer.step}, {seconds:.0f} s"
    )


def main() -> None:
    task_options, base_options, args = parse_options(
        (ConceptArguments, BaseArguments, DiffusionImmunizationConfig), description=__doc__.splitlines()[0]
    )
    pipeline, task = load_pipeline(base_options.base_path), ConceptTask(task_options)
    names = ("retain train", "retain validation", "harmful defense")
    splits = {name: task.examples(*name.split()) for name in names}
    described = asdict(task_options) | {"dataset": task.source}
    immunize(pipeline, splits, task.source, described, base_options.base_path, args)


if __name__ == "__main__":
    try:
        main()
    except ImmunizeError as error:
        sys.exit(f"{type(error).__name__}: {error}")
