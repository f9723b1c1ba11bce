"""Everything about model, options and datasets that can be found wrong before training starts."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_immunize.data import (
    PixelDataset,
    align_labels,
    check_source,
    first_row,
    for_model,
    id2label_of,
    is_stream,
    label_names_of,
    model_channels,
    names_classes,
    pixel_shape,
)
from hf_immunize.errors import ConfigError, DataError, ImmunizeError, ModelError
from hf_immunize.features import capture_inputs, find_classifier, linear_sites, under_adapters
from hf_immunize.training.core.registry import AnyTerm
from hf_immunize.training.vision.harmful_task import HarmfulTask
from hf_immunize.training.vision.primary import SINGLE, UNLABELLED, check_known_labels, kind_of, refuse_other_problem

_PACKAGE = Path(__file__).parents[2]

logger = logging.get_logger(__name__)


def head_of(model: nn.Module, args: Any) -> str:
    """The head's name; a model without one is measured at its sites, which then have to be named.

    Raises:
        ModelError: no head, or no module of the given name.
    """
    if args.feature_module:
        with capture_inputs(model, [args.feature_module]):
            pass  # raises for a name the model does not have
        return args.feature_module
    try:
        return find_classifier(model)
    except ModelError:
        if args.sites == "head":
            raise
        return linear_sites(model, args.sites)[-1]


def refuse_no_model(model: Any) -> None:
    """Raise ModelError for what is no model, a name or nothing: θ₀ has to be there before anything is checked."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"expected a model, got {model!r}: load it first, as AutoModelForImageClassification.from_pretrained(...) "
            "does. model_init is not called, since the guard and distillation compare with the model passed in."
        )


def check_data(
    model: nn.Module, primary: Any, harmful: Any, evaluation: Any, terms: Sequence[AnyTerm]
) -> tuple[str, list[Mapping[str, Any]], HarmfulTask]:
    """Kind of the primary task, the few rows of it that were read, row 0 before others, and the harmful task.

    Raises:
        DataError: an empty or missing dataset, missing columns, images of another size, labels outside their range, or
            a harmful class without rows.
        ModelError: a head with another number of outputs than the primary task has classes.
    """
    if primary is None or harmful is None:
        missing = "train_dataset" if primary is None else "harmful_dataset"
        raise DataError(f"expected a train_dataset and a harmful_dataset, got no {missing}.")
    if primary is harmful:
        logger.warning("train_dataset and harmful_dataset are one dataset: the model is to keep and not to learn it.")
    for name, rows in (("train_dataset", primary), ("harmful_dataset", harmful), *_parts(evaluation)):
        check_source(rows, name)
    first = first_row(primary, "train_dataset")
    pixels = _checked_pixels(model, first)
    kind = kind_of(model, first)
    if kind == SINGLE:
        refuse_other_problem(model, first)
    others = check_known_labels(model, primary, kind, "train_dataset")
    check_head(model, primary, kind)
    for name, rows in _parts(evaluation) if kind != UNLABELLED else ():
        check_known_labels(model, rows, kind, name)
        check_head(model, rows, kind, name)
    task = HarmfulTask(harmful, "harmful_dataset", terms)
    check_size(pixels.shape, task)
    return kind, [{**first, "pixel_values": pixels}, *others], task


def _checked_pixels(model: nn.Module, first: Mapping[str, Any]) -> Tensor:
    """The first primary image in the precision of the model's weights; DataError for another number of channels."""
    shape, channels = pixel_shape(first, "train_dataset"), model_channels(under_adapters(model))
    if channels is not None and shape[0] != channels:
        last = " Move the channels to the front, with pixels.permute(2, 0, 1)." if shape[-1] == channels else ""
        raise DataError(
            f"expected pixel_values of the model's {channels} channel(s), C x H x W, in train_dataset, got shape "
            f"{tuple(shape)} in row 0: preprocess the images with the model's processor.{last}"
        )
    return torch.as_tensor(first["pixel_values"]).to(dtype_of_images(model))


def dtype_of_images(model: nn.Module) -> torch.dtype:
    """The precision of the weights that read images."""
    return next((part.dtype for part in model.parameters() if part.is_floating_point()), torch.float32)


def check_size(size: torch.Size, task: HarmfulTask) -> None:
    """Raise DataError for harmful images of another size than the primary ones'."""
    other = pixel_shape(task.first, task.name)
    if size != other:
        raise DataError(
            f"expected harmful images of the primary images' size {tuple(size)} in {task.name}, got {tuple(other)}: "
            "preprocess both with the same image processor."
        )


def held_out_of(rows: Any, harmful: HarmfulTask, terms: Sequence[AnyTerm]) -> HarmfulTask | None:
    """Harmful rows that training does not see, once they are like those that it does; None where there are none.

    Raises:
        DataError: rows that are unlike, see ``HarmfulTask`` and ``check_size``.
    """
    if rows is None:
        return None
    held = HarmfulTask(rows, "harmful_eval_dataset", terms)
    check_size(pixel_shape(harmful.first, "harmful_dataset"), held)
    return held


@contextmanager
def forward_of_first(row: Mapping[str, Any]) -> Iterator[None]:
    """Around the first forwards, which are of one row: what the model's own code raises there is named.

    Raises:
        DataError: another error of the model's than one of memory.
    """
    try:
        yield
    except (ImmunizeError, torch.OutOfMemoryError):
        raise
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        if _PACKAGE in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parents:
            raise  # no forward's
        shape = tuple(torch.as_tensor(row["pixel_values"]).shape)
        raise DataError(
            f"expected images that the model takes in train_dataset, got {shape} in row 0, on which its forward raised "
            f"{type(error).__name__}: {error} Preprocess the images with the model's processor."
        ) from error


def refuse_streams(args: Any, streams: Mapping[str, Any]) -> None:
    """Raise ConfigError for options that need rows with numbers, where a dataset is a stream."""
    found = [name for name, rows in streams.items() if is_stream(rows)]
    if found and args.cache_frozen_features:
        raise ConfigError(
            f"expected datasets with numbered rows for cache_frozen_features, got a stream as {', '.join(found)}: set "
            "cache_frozen_features to false, or load the dataset without streaming=True."
        )
    if "train_dataset" in found and args.max_steps <= 0:
        raise ConfigError(
            "expected max_steps for a stream as train_dataset, whose end nobody knows, got num_train_epochs: set "
            "max_steps."
        )


def _parts(evaluation: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(evaluation, dict):
        yield from ((f"eval_dataset[{name!r}]", rows) for name, rows in evaluation.items())
    elif evaluation is not None:
        yield "eval_dataset", evaluation


def matched(model: Any, dataset: Any) -> Any:
    """A PixelDataset with the labels of the model's outputs, by name; anything else as it is (see ``check_head``)."""
    if isinstance(dataset, dict):
        return {name: matched(model, rows) for name, rows in dataset.items()}
    if not isinstance(dataset, PixelDataset) or not names_classes(id2label_of(model.config)):
        return dataset
    return for_model(dataset, id2label_of(model.config))


def check_head(model: Any, primary: Any, kind: str, name: str = "train_dataset") -> None:
    """Labels are compared with the head's outputs by name, where both sides have names.

    Raises:
        ModelError: classes that the head has no output for.
        DataError: the same classes in another order.
    """
    names = label_names_of(primary) if kind == SINGLE else None
    if names is None:
        return
    if len(names) != model.config.num_labels and not names_classes(id2label_of(model.config)):
        raise ModelError(
            f"expected a head with {len(names)} outputs, one for each class of {name}, got {model.config.num_labels}: "
            f"load the model with num_labels={len(names)} and train that head first, or pass the rows its head was "
            "trained on."
        )
    places = align_labels(names, id2label_of(model.config), name)
    if moved := [place for place, output in enumerate(places) if place != output]:
        told = ", ".join(f"{names[place]!r} is label {place} and output {places[place]}" for place in moved[:5])
        raise DataError(
            f"expected the labels of {name} in the order of the model's outputs, got {told}: map them by name with "
            "dataset.align_labels_with_mapping(model.config.label2id, 'label')."
        )


def check_unlabelled(model: nn.Module, args: Any, first: Mapping[str, Any], site: str) -> None:
    """Refuse what a primary task without labels cannot have: logits to imitate, a metric, features that are noise.

    Raises:
        ConfigError: such an option.
    """
    asked = {"distillation": args.distillation > 0, "max_primary_drop": args.max_primary_drop is not None}
    if found := [name for name, on in asked.items() if on]:
        raise ConfigError(
            f"expected no {' and no '.join(found)} for a primary task without labels, which has neither class logits "
            "nor an accuracy: use feature_distillation."
        )
    if args.feature_distillation and not _repeats(model, first, site):
        raise ConfigError(
            "expected a model that computes the same features twice for feature_distillation, got random ones: put the "
            "mask into the rows (bool_masked_pos, or noise for ViTMAE), so that both models see the same patches."
        )


@torch.no_grad()
def _repeats(model: nn.Module, row: Mapping[str, Any], site: str) -> bool:
    """Whether two forwards of one row, eight times over, give the same features in evaluation mode."""
    device = next(model.parameters()).device
    inputs = {name: torch.stack([torch.as_tensor(value)] * 8).to(device) for name, value in row.items()}
    was_training, found = model.training, []
    model.eval()
    try:
        for _ in range(2):
            with capture_inputs(model, [site]) as caught:
                model(**inputs)
            found.append(caught.raw(site))
    finally:
        model.train(was_training)
    return torch.equal(*found)
