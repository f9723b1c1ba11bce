"""Models that others saved, read one way: from safetensors, in float32, and only where every weight is a number."""

from hf_immunize.models.adapters import load_on_base, reads_images
from hf_immunize.models.classifiers import label_maps, load_classifier, load_processor, random_classifier
from hf_immunize.models.folders import is_adapter, refuse_folder, variant_of
from hf_immunize.models.weights import DIVERGED, non_finite, non_finite_in_file, refuse_below_float32, refuse_non_finite

__all__ = [
    "DIVERGED",
    "is_adapter",
    "label_maps",
    "load_classifier",
    "load_on_base",
    "load_processor",
    "non_finite",
    "non_finite_in_file",
    "random_classifier",
    "reads_images",
    "refuse_below_float32",
    "refuse_folder",
    "refuse_non_finite",
    "variant_of",
]
