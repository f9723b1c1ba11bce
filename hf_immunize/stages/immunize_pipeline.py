"""What the immunizing stage does to diffusion pipelines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from hf_immunize.data import PROBE_SPLIT, describe_source, parse_fractions
from hf_immunize.diffusion import (
    LatentDataset,
    component_of,
    decode,
    denoiser_of,
    draw_latents,
    grid_png,
    load_pipeline,
)
from hf_immunize.diffusion.denoisers import reader_of
from hf_immunize.diffusion.encoding import encode_prompt
from hf_immunize.errors import ConfigError
from hf_immunize.records import ImmunizationRecord, ModelFingerprint, Provenance, atomic_write
from hf_immunize.stages.base import ImmunizeOptions, fetch_base, require_outcome
from hf_immunize.tasks import family_of
from hf_immunize.training.diffusion import DiffusionImmunizationConfig, DiffusionImmunizationTrainer
from hf_immunize.training.diffusion.config import scientific_options
from hf_immunize.training.diffusion.setup import asks_for_none


class PipelineDefence:
    """A pipeline, of which the denoiser is trained."""

    stage, index, start = "immunize_diffusion", "model_index.json", None

    def __init__(self, arguments: Any, options: ImmunizeOptions, args: DiffusionImmunizationConfig):
        folder, source = fetch_base(options)
        if not args.merge_lora:
            raise ConfigError(
                "expected merge_lora=true, got false: this stage publishes an ordinary pipeline. Use the trainer "
                "itself and save_lora_adapter."
            )
        self._pipeline, self._args = load_pipeline(folder, denoiser_dtype=options.denoiser_dtype), args
        self._options, self._splits = options, arguments.concept_splits
        self.task = family_of(arguments).make(arguments, self._pipeline)
        self._model = getattr(self._pipeline, component_of(self._pipeline))
        self.base = self._fingerprint(folder, describe_source(options.base_path), source)
        self.options_told, self.is_main = scientific_options(args), PartialState(cpu=args.use_cpu).is_main_process

    def _fingerprint(self, folder: Path, name: str, source: Any = None) -> ModelFingerprint:
        kind, parameters = type(self._model).__name__, self._model.num_parameters()
        return ModelFingerprint.of_folder(folder, name=name, architecture=kind, parameters=parameters, source=source)

    def trainer(
        self, train: LatentDataset, validation: LatentDataset, defense: LatentDataset
    ) -> DiffusionImmunizationTrainer:
        """The trainer, which paints as it goes."""
        return DiffusionImmunizationTrainer(
            self._model, self._pipeline.scheduler, self._args, train_dataset=train, harmful_dataset=defense,
            eval_dataset=validation, validate=self._painter(validation, defense),
            harmful_eval_dataset=self._held_out(), null_conditions=self._null(train),
        )  # fmt: skip

    def _null(self, train: LatentDataset) -> Mapping[str, Tensor] | None:
        """What the pipeline makes of the empty prompt, where something is told that and it reads text."""
        if not asks_for_none(self._args) or "class_labels" in train.conditions or reader_of(self._pipeline) is None:
            return None
        return encode_prompt(self._pipeline, "", 8 * train.latents.shape[-1])

    def _held_out(self) -> LatentDataset | None:
        """Images of the concept that are not trained on: the split ``probe``, where there is one."""
        named = PROBE_SPLIT in parse_fractions(self._splits)
        return self.task.examples("harmful", PROBE_SPLIT) if named else None

    def _painter(self, *shown: LatentDataset) -> Callable[[Any, int], None]:
        """Draws retained classes and the concept from one seed into ``validation/step-N.png``."""
        denoiser, scheduler = denoiser_of(self._model), self._pipeline.scheduler
        size: Any = self._args.eval_batch_size
        asked = [held.batch(torch.arange(8) * (len(held) // 8)) for held in shown]

        def paint(model: Any, step: int) -> None:
            drawn = [
                draw_latents(denoiser, model, scheduler, batch.conditions, batch.latents.shape, batch_size=size)
                for batch in asked
            ]
            pixels = decode(torch.cat(drawn), getattr(self._pipeline, "vae", None))
            atomic_write(Path(self._args.output_dir, "validation", f"step-{step}.png"), grid_png(pixels, 8))

        return paint

    def save(self, trainer: DiffusionImmunizationTrainer) -> None:
        """The whole pipeline; weights that are split over processes are put together by all of them."""
        released = trainer.whole_model()
        if self.is_main:
            setattr(self._pipeline, component_of(self._pipeline), released)
            self._model = released
            self._pipeline.to("cpu").save_pretrained(self._args.output_dir)

    def record(self, trainer: DiffusionImmunizationTrainer, **known: Any) -> ImmunizationRecord:
        """Guard and provenance."""
        folder, guard = Path(self._args.output_dir), trainer.guard_record
        assert guard is not None, "training has ended"
        return ImmunizationRecord(
            model=self._fingerprint(folder, folder.name), base=self.base, config=self.options_told,
            seeds={"seed": self._args.seed}, spectra={}, guard=guard, steps=trainer.step, outcome=trainer.outcome,
            provenance=Provenance.here(str(trainer.accelerator.device)), **known,
        )  # fmt: skip

    def told(self, guard: Any) -> str:
        """How far the retained concepts have gone."""
        return f"retain denoising loss {guard.drop:+.2f} (100 ln of its factor)"

    def leave(self, trainer: DiffusionImmunizationTrainer) -> None:
        """Raises NotImmunizedError where ``require`` is not met."""
        require_outcome(self._options, trainer.outcome)
