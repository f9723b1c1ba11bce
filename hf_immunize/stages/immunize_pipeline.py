"""The immunizing stage for diffusion pipelines."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_immunize.data import describe_source
from hf_immunize.diffusion import (
    LatentDataset,
    component_of,
    decode,
    denoiser_of,
    draw_latents,
    grid_png,
    load_pipeline,
)
from hf_immunize.records import (
    ImmunizationRecord,
    ModelFingerprint,
    Provenance,
    atomic_write,
    begin_run,
    fingerprint_of,
)
from hf_immunize.stages.base import ImmunizeOptions, fetch_base, leave_finished
from hf_immunize.tasks import family_of
from hf_immunize.training.diffusion import DiffusionImmunizationConfig, DiffusionImmunizationTrainer
from hf_immunize.training.diffusion.config import scientific_options
from hf_immunize.training.vision.checkpoints import last_complete_checkpoint

_STAGE = "immunize_diffusion"
_SEEN = (("retain", "train"), ("retain", "validation"), ("harmful", "defense"))
"""All that a defender may look at."""


def immunize_pipeline(
    arguments: Any, options: ImmunizeOptions, args: DiffusionImmunizationConfig
) -> DiffusionImmunizationTrainer | None:
    """See ``immunize_model``."""
    folder, source = fetch_base(options)
    pipeline = load_pipeline(folder)
    task = family_of(arguments).make(arguments, pipeline)
    model = getattr(pipeline, component_of(pipeline))
    base = ModelFingerprint.of_folder(
        folder, name=describe_source(options.base_path), architecture=type(model).__name__,
        parameters=model.num_parameters(), source=source,
    )  # fmt: skip
    train, validation, defense = (task.examples(*part) for part in _SEEN)
    data = [task.fingerprint(*part) for part in _SEEN]
    inputs = {
        "base": base.weights,
        "task": task.described(),
        "data": {found.role: found.sha256 for found in data},
        "options": scientific_options(args),
    }
    trainer = DiffusionImmunizationTrainer(
        model, pipeline.scheduler, args, train_dataset=train, harmful_dataset=defense, eval_dataset=validation,
        validate=_painter(pipeline, (validation, defense), Path(args.output_dir), args.eval_batch_size),
    )  # fmt: skip
    main_process = trainer.accelerator.is_main_process
    if begin_run(args.output_dir, _STAGE, inputs, write=main_process):
        print(f"{args.output_dir}: already immunized, nothing to do")
        return None
    start = time.perf_counter()
    trainer.train(last_complete_checkpoint(args.output_dir))
    if main_process:
        pipeline.to("cpu").save_pretrained(args.output_dir)
        _write_record(trainer, inputs, base=base, data=data, seconds=time.perf_counter() - start)
    return trainer


def _painter(
    pipeline: Any, shown: tuple[LatentDataset, LatentDataset], folder: Path, batch_size: int
) -> Callable[[Any, int], None]:
    """Draws retained classes and the concept from one seed into ``validation/step-N.png``."""
    denoiser = denoiser_of(getattr(pipeline, component_of(pipeline)))
    asked = [held.batch(torch.arange(8) * (len(held) // 8)) for held in shown]

    def paint(model: Any, step: int) -> None:
        drawn = [
            draw_latents(
                denoiser, model, pipeline.scheduler, batch.conditions, batch.latents.shape, batch_size=batch_size
            )
            for batch in asked
        ]
        pixels = decode(torch.cat(drawn), getattr(pipeline, "vae", None))
        atomic_write(folder / "validation" / f"step-{step}.png", grid_png(pixels, 8))

    return paint


def _write_record(trainer: DiffusionImmunizationTrainer, inputs: dict[str, Any], **known: Any) -> None:
    """``immunization.json`` beside the weights, checkpoints gone, the run marked as whole; say how it went."""
    args, guard, bare = trainer.args, trainer.guard_record, trainer.bare
    folder = Path(args.output_dir)
    model = ModelFingerprint.of_folder(
        folder, name=folder.name, architecture=type(bare).__name__, parameters=bare.num_parameters()
    )
    ImmunizationRecord(
        model=model, config=scientific_options(args), fingerprint=fingerprint_of(inputs), seeds={"seed": args.seed},
        spectra={}, guard=guard, steps=trainer.step, provenance=Provenance.here(str(trainer.accelerator.device)),
        **known,
    ).write(folder / "immunization.json")  # fmt: skip
    leave_finished(folder, _STAGE, inputs, ["model_index.json", "immunization.json"])
    print(
        f"{folder.name}: retain denoising loss {guard.drop:+.2f} (100 ln of its factor), weights of step "
        f"{guard.returned_step} of {trainer.step}, {known['seconds']:.0f} s"
    )
