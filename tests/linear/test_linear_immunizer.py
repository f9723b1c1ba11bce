"""The class users meet: inputs of every kind, what methods do, what a report says, what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from datasets import Dataset
from linear_builders import gaussian, spread_rows

from hf_immunize.errors import ConfigError, DataError, ModelError, SpectrumError, TrainingDivergedError
from hf_immunize.linalg.pencil import union_basis
from hf_immunize.linear import (
    DescentConfig,
    LinearImmunizer,
    LinearTask,
    as_matrix,
    preserve_function,
)
from hf_immunize.linear.directions import Through, ill_direction, well_direction
from hf_immunize.linear.experiment import markdown_table, run_methods, summarize


@pytest.fixture
def immunizer():
    primary, harmful = spread_rows(0, 30, 6, 1.0), spread_rows(5, 30, 6, 1.0)
    return LinearImmunizer(primary, harmful, primary_labels=gaussian(1, 30), harmful_labels=gaussian(2, 30))


def test_tensors_arrays_lists_and_dataset_columns_give_one_answer():
    primary, harmful = spread_rows(0, 9, 3, 1.0), spread_rows(5, 9, 3, 1.0)
    table = Dataset.from_dict({"p": primary.tolist(), "h": harmful.tolist()})
    sources = [(primary, harmful), (primary.numpy(), harmful.numpy()), (table["p"], table["h"])]
    limits = [LinearImmunizer(p, h).limit.condition_limit for p, h in sources]
    moments = LinearImmunizer.from_moments(primary.T @ primary, harmful.T @ harmful)
    assert limits == pytest.approx([moments.limit.condition_limit] * 3, rel=1e-9)


def test_image_columns_are_flattened_and_dtypes_kept():
    images = [np.full((2, 2), value, dtype=np.uint8) for value in (1, 2)]
    assert as_matrix(images).tolist() == [[1.0] * 4, [2.0] * 4]
    assert as_matrix(np.ones((2, 3), dtype=np.float32)).dtype == torch.float32
    assert as_matrix(torch.ones(2, 3, dtype=torch.long)).dtype == torch.float64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0], [1.0, 2.0]], "one shape"),
        (["a", "b"], "numeric"),
        ([], "at least one row"),
        ("text", "datasets column"),
        (3, "datasets column"),
        (torch.ones(2, dtype=torch.bool), "real numbers"),
    ],
    ids=["ragged", "text", "empty", "string", "number", "bool"],
)
def test_rows_that_cannot_be_read_are_refused(values, message):
    with pytest.raises(DataError, match=message):
        as_matrix(values)


@pytest.mark.parametrize("rows", [30, 4], ids=["tall", "wide"])
def test_refit_loss_is_that_of_numpy_lstsq(rows):
    features, labels = spread_rows(3, rows, 6, 1.0), gaussian(4, rows)
    theta = gaussian(5, 6, 4)
    task = LinearTask.of_features(features, labels)
    for extractor in (None, theta):
        design = (features if extractor is None else features @ extractor).numpy()
        residual = labels.numpy() - design @ np.linalg.lstsq(design, labels.numpy(), rcond=None)[0]
        assert task.refit_loss(extractor) == pytest.approx((residual**2).mean(), abs=1e-12)


def test_labelled_and_unlabelled_tasks_have_one_factor():
    features = spread_rows(3, 30, 6, 1.0)
    with_labels, without = LinearTask.of_features(features, gaussian(4, 30)), LinearTask.of_features(features)
    torch.testing.assert_close(with_labels.factor.sigma_R, without.factor.sigma_R)
    assert with_labels.factor.tolerance == without.factor.tolerance


def test_algorithm1_immunizes_and_keeps_the_primary_loss(immunizer):
    report = immunizer.report(immunizer.algorithm1(epochs=60, strength=0.01).theta_DD)
    assert report.rank_aware.ratio > 2 and report.rank_aware.primary_ratio < 1 < report.rank_aware.harmful_ratio
    assert report.primary_loss == pytest.approx(report.primary_loss_before, rel=1e-9)
    assert report.harmful_loss == pytest.approx(report.harmful_loss_before, rel=1e-9)  # κ removes no information
    assert report.limit_fraction <= 1 + 1e-9


def test_clustered_steps_come_closer_to_the_limit(immunizer):
    plain, clustered = (
        immunizer.report(immunizer.algorithm1(epochs=20, strength=0.02, cluster=c, balance=0.1).theta_DD).limit_fraction
        for c in (0.0, 0.2)
    )
    assert clustered > plain


def test_methods_do_what_their_names_say(immunizer):
    def ratios(method, **options):
        right = immunizer.report(getattr(immunizer, method)(epochs=30, **options).theta_DD).rank_aware
        return right.harmful_ratio, right.primary_ratio

    assert ratios("ill_only", balance=1.0)[0] > 1.5
    kappa_h, kappa_p = ratios("opt_kappa")
    assert kappa_h / kappa_p > 2
    assert ratios("imma", strength=0.05, balance=1.0) != pytest.approx((1, 1))


def test_imma_ascends_the_loss_that_its_simulated_attacker_reaches(immunizer):
    """A short step raises L_H(w'(θ), θ), w' one attacker step from the seeded head, by what finite differences say."""
    union = union_basis(immunizer.primary.factor, immunizer.harmful.factor)
    x, y = immunizer.harmful.triangle_SD, immunizer.harmful.labels_S
    generator = torch.Generator().manual_seed(0)
    torch.randn(6, 6, generator=generator, dtype=torch.float64)  # the start of θ comes first
    head = union @ torch.randn(6, generator=generator, dtype=torch.float64)
    rate = 30 / (2 * x.square().sum())

    def reached(theta):
        stepped = head - rate * 2 * theta.T @ (x.T @ (x @ theta @ head - y)) / 30
        return float((x @ theta @ stepped - y).square().sum()) / 30

    options = {"epochs": 1, "steps_per_epoch": 1, "initial_noise": 0.0, "learning_rate": 0.0, "balance": 1.0}
    eye = torch.eye(6, dtype=torch.float64)
    move = immunizer.imma(strength=1e-6, **options).theta_DD - eye
    gradient = torch.zeros(6, 6, dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            bump = torch.zeros(6, 6, dtype=torch.float64)
            bump[i, j] = 1e-5
            gradient[i, j] = (reached(eye + bump) - reached(eye - bump)) / 2e-5
    torch.testing.assert_close(move / move.norm(), gradient / gradient.norm(), rtol=1e-4, atol=1e-6)


def test_fixed_weights_are_plain_gradient_steps(immunizer):
    """Two steps with fixed λ equal η(∇L + λ_PK⁻¹∇R_well + λ_HK⁻¹∇R_ill) computed by hand."""
    rate = 1e-6
    theta = immunizer.algorithm1(
        epochs=1, steps_per_epoch=2, initial_noise=0.0, learning_rate=rate, primary_weight=0.5, harmful_weight=2.0
    ).theta_DD
    x, y = immunizer.primary.triangle_SD, immunizer.primary.labels_S
    by_hand, head = torch.eye(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for _ in range(2):
        at_p, at_h = (
            Through.of(task.factor.factor_RD, task.factor.right_DR.T, by_hand)
            for task in (immunizer.primary, immunizer.harmful)
        )
        slope = 2 * x.T @ (x @ by_hand @ head - y) / 30
        well, ill = well_direction(at_p, width=6), ill_direction(at_h)
        step = torch.outer(slope, head) + 0.5 * well + 2.0 * ill
        by_hand, head = by_hand - rate * step, head - rate * by_hand.T @ slope
    torch.testing.assert_close(theta, by_hand, rtol=1e-10, atol=1e-12)


def test_equal_seeds_give_equal_extractors_and_others_do_not(immunizer):
    one, two, other = (immunizer.algorithm1(epochs=3, seed=s).theta_DD for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.allclose(one, other)


def test_moments_alone_are_enough_except_for_imma():
    immunizer = LinearImmunizer.from_moments(torch.diag(torch.tensor([1.0, 9.0])), torch.diag(torch.tensor([9.0, 1.0])))
    report = immunizer.report(immunizer.algorithm1(epochs=5).theta_DD)
    assert report.primary_loss is None and report.limit_ratio == pytest.approx(81)
    with pytest.raises(ConfigError, match="labels on both tasks"):
        immunizer.imma()
    with pytest.raises(DataError, match="pass labels"):
        immunizer.primary.refit_loss()


def test_bad_tasks_are_refused():
    with pytest.raises(SpectrumError, match="one width"):
        LinearImmunizer(torch.eye(2), torch.eye(3))
    with pytest.raises(SpectrumError, match="finite"):
        LinearImmunizer(torch.full((2, 2), float("nan")), torch.eye(2))
    with pytest.raises(SpectrumError, match="zero matrix"):
        LinearImmunizer(torch.zeros(2, 2), torch.eye(2), primary_labels=[1.0, 2.0])
    with pytest.raises(DataError, match="one label for each of 2 rows"):
        LinearTask.of_features(torch.eye(2), [1.0])
    with pytest.raises(DataError, match="finite labels"):
        LinearTask.of_features(torch.eye(2), [1.0, float("nan")])


@pytest.mark.parametrize(
    "options",
    [{"epochs": 0}, {"strength": 0.0}, {"balance": -1.0}, {"cluster": 1.0}, {"initial_noise": -1.0},
     {"steps_per_epoch": 0}, {"learning_rate": -1.0}, {"attacker_steps": 0}],
    ids=lambda o: next(iter(o)),
)  # fmt: skip
def test_options_out_of_range_are_refused(immunizer, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        immunizer.algorithm1(**options)


def test_every_option_has_help_text():
    assert all(f.metadata.get("help") for f in dataclasses.fields(DescentConfig))


def test_a_head_keeps_its_outputs(immunizer):
    theta, head, rows = immunizer.closed_form().theta_DD, gaussian(7, 3, 6), gaussian(8, 20, 6)
    through = preserve_function(theta, head, rows)
    torch.testing.assert_close((rows @ theta) @ through.weight_CD.T, rows @ head.T)
    assert through.difference < 1e-10


def test_a_trained_layer_keeps_its_logits_in_place():
    """φ → φθ, W → θ⁻¹W with real modules: a Linear in front of the head, the bias as it was."""
    primary, harmful = spread_rows(0, 40, 6, 1.0), spread_rows(5, 40, 6, 1.0)
    head = torch.nn.Linear(6, 3).double()
    through = preserve_function(LinearImmunizer(primary, harmful).closed_form().theta_DD, head.weight, primary)
    inserted, new = torch.nn.Linear(6, 6, bias=False).double(), torch.nn.Linear(6, 3).double()
    inserted.weight.data, new.weight.data, new.bias.data = through.theta_DD.T, through.weight_CD, head.bias.data
    torch.testing.assert_close(new(inserted(primary)), head(primary))


def test_heads_that_cannot_be_preserved_are_refused():
    with pytest.raises(ModelError, match="invertible"):
        preserve_function(torch.zeros(2, 2), torch.eye(2), torch.eye(2))
    with pytest.raises(ModelError, match="square theta"):
        preserve_function(torch.ones(2, 3), torch.eye(2), torch.eye(2))
    nearly = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-13]], dtype=torch.float64)
    with pytest.raises(ModelError, match="agree"):
        preserve_function(nearly, gaussian(0, 2, 2), gaussian(1, 5, 2), tolerance=1e-16)


def test_experiment_rows_and_tables(immunizer):
    methods = [{"method": "closed_form", "budget": 2.0}, {"method": "algorithm1", "name": "ours", "epochs": 2}]
    rows = list(run_methods(immunizer, methods, [0, 1]))
    assert [row["name"] for row in rows] == ["closed_form", "ours", "ours"]
    table = summarize(rows)
    assert table[0]["rir"]["sd"] is None and table[1]["rir"]["sd"] is not None
    assert table[1]["rir"]["mean"] == pytest.approx((rows[1]["rir"] + rows[2]["rir"]) / 2)
    assert markdown_table(table).count("\n") == 3
    with pytest.raises(ConfigError, match="closed_form"):
        list(run_methods(immunizer, [{"method": "magic"}], [0]))
    with pytest.raises(ConfigError, match="options of algorithm1"):
        list(run_methods(immunizer, [{"method": "algorithm1", "magic": 1}], [0]))


def test_descent_that_leaves_the_numbers_is_an_error(immunizer):
    with pytest.raises((TrainingDivergedError, SpectrumError), match="finite|not finite"):
        immunizer.algorithm1(epochs=50, primary_weight=1e200, harmful_weight=1e200)
