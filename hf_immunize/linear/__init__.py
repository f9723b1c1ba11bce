"""Linear immunization, exact: the paper's methods, the limit no method passes, and the closed form that attains it."""

from hf_immunize.linear.closed_form import HeadThroughTheta, closed_form_theta, preserve_function
from hf_immunize.linear.data import TaskRows, load_house_prices, load_mnist, slant_labels
from hf_immunize.linear.descent import METHODS, DescentConfig
from hf_immunize.linear.immunizer import LinearImmunization, LinearImmunizer, LinearReport
from hf_immunize.linear.limits import (
    ImmunizationLimit,
    common_range_conditions,
    covariance_angles,
    eigenvector_overlaps,
    immunization_limit,
)
from hf_immunize.linear.metrics import (
    ImmunizationRatio,
    condition,
    paper_log_condition,
    relative_immunization_ratio,
)
from hf_immunize.linear.probe import ProbeCurves, line_search_probe
from hf_immunize.linear.tasks import LinearTask, as_matrix

__all__ = [
    "METHODS",
    "DescentConfig",
    "HeadThroughTheta",
    "ImmunizationLimit",
    "ImmunizationRatio",
    "LinearImmunization",
    "LinearImmunizer",
    "LinearReport",
    "LinearTask",
    "ProbeCurves",
    "TaskRows",
    "as_matrix",
    "closed_form_theta",
    "common_range_conditions",
    "condition",
    "covariance_angles",
    "eigenvector_overlaps",
    "immunization_limit",
    "line_search_probe",
    "load_house_prices",
    "load_mnist",
    "paper_log_condition",
    "preserve_function",
    "relative_immunization_ratio",
    "slant_labels",
]
