"""Models that others saved, read one way: from safetensors, in float32, and only where every weight is a number."""

from hf_immunize.models.classifiers import label_maps, load_classifier, load_processor, random_classifier
from hf_immunize.models.folders import refuse_folder, variant_of
from hf_immunize.models.weights import DIVERGED, non_finite, non_finite_in_file, refuse_below_float32, refuse_non_finite

__all__ = [
    "DIVERGED",
    "label_maps",
    "load_classifier",
    "load_processor",
    "non_finite",
    "non_finite_in_file",
    "random_classifier",
    "refuse_below_float32",
    "refuse_folder",
    "refuse_non_finite",
    "variant_of",
]
