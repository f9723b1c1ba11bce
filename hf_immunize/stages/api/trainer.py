"""The trainer that most people meet: that of ``hf_immunize.training``, and a short way to its exam."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_immunize.stages.api.result import ExamResult
from hf_immunize.training import ImmunizationTrainer as _Trainer


class ImmunizationTrainer(_Trainer):  # noqa: D101  (its docstring is that of the other)
    __doc__ = _Trainer.__doc__

    def certify(self, *, base: Any, primary: Any, harmful: Any, **options: Any) -> ExamResult:
        """Save the trained model and sit its exam; traces and certificate join it in ``args.output_dir``.

        The exam is somebody else's code: it reads the saved weights and the data you name, nothing of this trainer.

        Args:
            base: the model before immunization, as ``Exam`` takes it.
            primary: source of the images that the model keeps, as ``Exam`` takes it: the exam splits it itself, so give
                the whole source and not the rows that were trained on.
            harmful: source of the harmful images, whole as well.
            options: of ``Exam``: protocol, benign, task, attack, certify, device.

        Raises:
            ConfigError, ModelError, DataError: as ``Exam``.
        """
        from hf_immunize.stages.api.exam import Exam

        folder = Path(str(self.args.output_dir))
        self.save_model()
        exam = Exam(
            folder, base=base, primary=primary, harmful=harmful, in_place=True, output_dir=folder.with_name(
                f"{folder.name}-exam"), processing_class=self.processing_class, **options,
        )  # fmt: skip
        return exam.run()
