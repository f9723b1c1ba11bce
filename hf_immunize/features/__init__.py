"""What a network computes inside: its head, its blocks, the inputs of named layers, and where its frozen part ends."""

from hf_immunize.features.blocks import block_names, find_stages, find_trunk, names_after_trunk
from hf_immunize.features.boundary import Boundary, find_boundary
from hf_immunize.features.capture import Captured, capture_inputs
from hf_immunize.features.extract import extract_features, feature_batches
from hf_immunize.features.finding import find_layouts, unmoved_inputs
from hf_immunize.features.headed import BackboneForImageClassification, HeadedBackboneConfig, add_head
from hf_immunize.features.heads import find_classifier, under_adapters
from hf_immunize.features.layout import lying_channels_last, prefer_channels_last
from hf_immunize.features.patterns import linear_sites, match_modules, trainable_modules
from hf_immunize.features.rows import RowLayout, parse_layouts, pool_rows

__all__ = [
    "BackboneForImageClassification",
    "Boundary",
    "Captured",
    "HeadedBackboneConfig",
    "RowLayout",
    "add_head",
    "block_names",
    "capture_inputs",
    "extract_features",
    "feature_batches",
    "find_boundary",
    "find_classifier",
    "find_layouts",
    "find_stages",
    "find_trunk",
    "linear_sites",
    "lying_channels_last",
    "match_modules",
    "names_after_trunk",
    "parse_layouts",
    "pool_rows",
    "prefer_channels_last",
    "trainable_modules",
    "under_adapters",
    "unmoved_inputs",
]
