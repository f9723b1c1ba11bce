"""Data of both tasks: sources, content-hash splits, pixels, fingerprints, and the harmful stream."""

from hf_immunize.data.alignment import (
    align_labels,
    for_model,
    id2label_of,
    names_classes,
    output_names,
    plain_name,
    refuse_other_labels,
)
from hf_immunize.data.augment import AUGMENTATIONS, augment, parse_augmentation
from hf_immunize.data.caching import cache_folder, identity_of, is_shared
from hf_immunize.data.classes import Classes, parse_labels, read_classes, select_classes
from hf_immunize.data.columns import find_columns
from hf_immunize.data.copies import refuse_one_task, warn_of_copies
from hf_immunize.data.fingerprint import digest_rows, fingerprint
from hf_immunize.data.images import BACKGROUND, convert_image, decode_image
from hf_immunize.data.iterables import NamedStream, RankBatches, check_source, first_row, is_stream
from hf_immunize.data.labels import (
    Labels,
    check_classes,
    check_label_range,
    check_sample,
    find_labels,
    label_names_of,
    labels_of,
    pixel_shape,
    read_labels,
    whole_number,
)
from hf_immunize.data.levels import ImageFault, ImageTally
from hf_immunize.data.pixels import ImagePixels, PixelDataset, collate_pixels, preprocess
from hf_immunize.data.processors import PixelMaker, model_channels
from hf_immunize.data.row_store import RowStore
from hf_immunize.data.rows import (
    NamedRows,
    as_mapping,
    check_rows,
    fetch,
    has_transform,
    label_key,
    named_workers,
    read_image,
)
from hf_immunize.data.sources import describe_source, load_source
from hf_immunize.data.splits import (
    HARMFUL_SPLITS,
    PRIMARY_SPLITS,
    PROBE_SPLIT,
    assign_splits,
    parse_fractions,
    split_by_content,
    split_few_by_content,
)
from hf_immunize.data.streams import RowBatchSampler, StepBatchSampler, StepSampler
from hf_immunize.data.targets import Targets, targets_of, unlabelled
from hf_immunize.data.tasks import SIDES, Task, TaskArguments, batches, forward_rows

__all__ = [
    "AUGMENTATIONS",
    "BACKGROUND",
    "Classes",
    "HARMFUL_SPLITS",
    "ImageFault",
    "ImagePixels",
    "ImageTally",
    "Labels",
    "NamedRows",
    "NamedStream",
    "PRIMARY_SPLITS",
    "PROBE_SPLIT",
    "PixelDataset",
    "PixelMaker",
    "RankBatches",
    "RowBatchSampler",
    "RowStore",
    "SIDES",
    "StepBatchSampler",
    "StepSampler",
    "Targets",
    "Task",
    "TaskArguments",
    "align_labels",
    "as_mapping",
    "assign_splits",
    "augment",
    "batches",
    "cache_folder",
    "check_classes",
    "check_label_range",
    "check_rows",
    "check_sample",
    "check_source",
    "collate_pixels",
    "convert_image",
    "decode_image",
    "describe_source",
    "digest_rows",
    "fetch",
    "find_columns",
    "find_labels",
    "fingerprint",
    "first_row",
    "for_model",
    "forward_rows",
    "has_transform",
    "id2label_of",
    "identity_of",
    "is_shared",
    "is_stream",
    "label_key",
    "label_names_of",
    "labels_of",
    "load_source",
    "model_channels",
    "named_workers",
    "names_classes",
    "plain_name",
    "output_names",
    "parse_augmentation",
    "parse_fractions",
    "parse_labels",
    "pixel_shape",
    "preprocess",
    "read_classes",
    "read_image",
    "read_labels",
    "refuse_other_labels",
    "select_classes",
    "split_by_content",
    "split_few_by_content",
    "targets_of",
    "unlabelled",
    "refuse_one_task",
    "warn_of_copies",
    "whole_number",
]
