"""``Exam``: attack a model and its base alike, judge, and get the certificate, in one call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from hf_immunize.attacks.core.plan import find_attack
from hf_immunize.errors import IncompleteExamError
from hf_immunize.exam import DIFFUSION_PROTOCOLS, PROTOCOLS, find_protocol
from hf_immunize.options import make_options
from hf_immunize.stages.api.places import make_task, place_model
from hf_immunize.stages.api.result import ExamResult
from hf_immunize.stages.attack import AttackOptions, attack_model, tables
from hf_immunize.stages.certify import CertifyOptions, certify_model
from hf_immunize.tasks import family_of


class Exam:
    """The exam of one model: how much longer an attacker needs than with the base, attack by attack.

    Args:
        model: the model under test: folder (save_pretrained), Hub id, loaded classifier, or diffusers pipeline.
        base: the model it was immunized from, in any of these forms. It is attacked with the same effort.
        primary: images that the model keeps: folder with a sub-folder per class, table, Hub id or ``datasets.Dataset``;
            for a pipeline that reads prompts a folder of photos.
        harmful: images that it shall not learn.
        benign: images of a harmless task that it shall still be able to learn.
        protocol: preset exam: quick, standard, thorough; for pipelines diffusion_quick, diffusion_standard.
        task: further options of the data, by their names for the stages (``{"primary_labels": "0,1,2"}``).
        attack: options of every attack (``{"seeds": [0, 1], "settings": ["lora.steps=50"]}``).
        certify: options of the judge.
        processing_class: image processor of loaded classifiers.
        output_dir: where copies, traces and results are kept, and found again by a second call; a new temporary folder
            by default.
        device: auto, cpu, cuda or mps.
        in_place: leave traces and certificate in ``model``'s own folder, which then has to be one.

    Raises:
        ConfigError: an unknown protocol, attack or option.
        ModelError, DataError: something that cannot be read; from ``run`` as well.
    """

    def __init__(
        self, model: Any, *, base: Any, primary: Any, harmful: Any, benign: Any = None, protocol: str = "standard",
        task: Mapping[str, Any] | None = None, attack: Mapping[str, Any] | None = None,
        certify: Mapping[str, Any] | None = None, processing_class: Any = None, output_dir: str | Path | None = None,
        device: str = "auto", in_place: bool = False,
    ):
        root = Path(output_dir or mkdtemp(prefix="hf_immunize-exam-"))
        self.output_dir = root
        self.model = Path(str(model)) if in_place else place_model(model, root / "model", processing_class)
        self.base = place_model(base, root / "base", processing_class)
        sources = {"primary": primary, "harmful": harmful, "benign": benign}
        self.task = make_task(self.model, root / "data", sources, dict(task or {}))
        self._benign, self._attack, self._certify = benign is not None, dict(attack or {}), dict(certify or {})
        presets = PROTOCOLS if family_of(self.task).kind == "classifier" else DIFFUSION_PROTOCOLS
        if protocol == "standard" and protocol not in presets:
            protocol = "diffusion_standard"
        find_protocol(protocol, presets)
        self._shared = {"protocol": protocol, "device": device}
        self._options("subject", "harmful")  # options that no attack has are told now
        for name in self._attack.get("attacks") or ():
            find_attack(name, tables(family_of(self.task))[0])

    def run(self) -> ExamResult:
        """Attack the base and the model, judge, and write certificate and model card. Runs on disk are not made again.

        Raises:
            RunMismatchError: ``output_dir`` holds traces of other options.
            IncompleteExamError: attacks without results on one side.
        """
        for task in ("harmful", *(("benign",) if self._benign else ())):
            for role in ("control", "subject"):
                attack_model(self.task, self._options(role, task))
        told = {**self._shared, **self._certify, "model_path": str(self.model), "base_path": str(self.base)}
        (options,) = make_options((CertifyOptions,), told, "certify")
        certificate = certify_model(self.task, options)
        if certificate is None:
            raise IncompleteExamError("expected the exam in the main process, got another: run it in one process.")
        return ExamResult(certificate, self.model, self.base)

    def _options(self, role: str, task: str) -> AttackOptions:
        """The options of one side's attacks; those of harmful attacks by name are not for the benign task."""
        kept = self._attack if task == "harmful" else {
            name: value for name, value in self._attack.items() if name not in ("attacks", "settings")
        }
        folder = self.base if role == "control" else self.model
        told = {**self._shared, **kept, "model_path": str(folder), "role": role, "task": task}
        told |= {"control_path": str(self.base)} if role == "subject" else {}
        (options,) = make_options((AttackOptions,), told, "attack")
        return options
