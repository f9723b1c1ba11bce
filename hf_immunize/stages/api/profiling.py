"""``profile``: where along a classifier's depth a harmful task lies, before anything is defended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from hf_immunize.errors import ConfigError
from hf_immunize.options import make_options
from hf_immunize.records import DepthProfile
from hf_immunize.stages.api.places import make_task, place_model
from hf_immunize.tasks import family_of


def profile(
    model: Any, primary: Any, harmful: Any, *, output_dir: str | Path | None = None, processing_class: Any = None,
    task: Mapping[str, Any] | None = None, **options: Any,
) -> DepthProfile:
    """T(n), probes by depth, the uplift over no model, and the trained depth and sites that follow from them.

    Args:
        model: folder (save_pretrained), Hub id or loaded classifier that nobody has defended yet.
        primary: images that the model keeps, as for ``immunize``.
        harmful: images that it shall not learn; the defender's split of them alone is used.
        output_dir: where ``profile.json``, ``profile.svg`` and traces are kept, and found again by a second call; a new
            temporary folder by default.
        processing_class: image processor of a loaded classifier.
        task: further options of the data, by their names for the stages.
        options: options of ``hf-immunize profile``, e.g. ``steps=200``.

    Raises:
        ConfigError: an unknown option, or a pipeline.
        ModelError, DataError: something that cannot be read.
    """
    from hf_immunize.stages.profile import ProfileOptions, profile_model

    root = Path(output_dir or mkdtemp(prefix="hf_immunize-profile-"))
    placed = place_model(model, root / "model", processing_class)
    arguments = make_task(placed, root / "data", {"primary": primary, "harmful": harmful}, dict(task or {}))
    if family_of(arguments).kind != "classifier":
        raise ConfigError("expected a classifier to profile, got a pipeline: its blocks are no list up to a head.")
    told = options | {"model_path": str(placed), "output_path": str(root)}
    return profile_model(arguments, make_options((ProfileOptions,), told, "profile")[0])
