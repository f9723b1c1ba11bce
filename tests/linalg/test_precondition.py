import pytest
import torch
from torch.nn.functional import linear

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg import second_moment_spectrum
from hf_immunize.linalg.factor import factor_features
from hf_immunize.linalg.precondition import InverseMoment, precondition, preconditioned_linear
from hf_immunize.regularizers import ill_conditioned, well_conditioned


def rows(n=12, d=4, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_forward_is_identity_and_backward_solves_on_the_input_side():
    x, theta = rows(), rows(4, 3, 1).requires_grad_(True)
    moment = x.T @ x
    out = precondition(theta, InverseMoment.of_moment(moment))
    assert torch.equal(out, theta)
    upstream = rows(4, 3, 2)
    out.backward(upstream)
    torch.testing.assert_close(theta.grad, torch.linalg.solve(moment, upstream))


def test_weight_layout_multiplies_from_the_right():
    x, weight = rows(), rows(3, 4, 1).requires_grad_(True)
    upstream = rows(3, 4, 2)
    precondition(weight, InverseMoment.of_moment(x.T @ x), weight_layout=True).backward(upstream)
    torch.testing.assert_close(weight.grad, upstream @ torch.linalg.inv(x.T @ x))


@pytest.mark.parametrize("ridge", [0.5, 1e-3])
def test_ridge_of_a_singular_moment(ridge):
    x = rows(2, 4)
    gradient = rows(4, 3, 1)
    truth = torch.linalg.solve(x.T @ x + ridge * torch.eye(4, dtype=torch.float64), gradient)
    inverse = InverseMoment.of(factor_features(x), ridge=ridge)
    torch.testing.assert_close(inverse.apply(gradient), truth, rtol=1e-9, atol=1e-9)


def test_pseudo_inverse_of_a_singular_moment():
    x, gradient = rows(2, 4), rows(4, 3, 1)
    inverse = InverseMoment.of_features(x)
    torch.testing.assert_close(inverse.apply(gradient), torch.linalg.pinv(x.T @ x / 2) @ gradient)


def test_one_backward_pass_is_a_step_of_algorithm_1():
    """Each regularizer sees θ through its own identity layer; the primary loss sees θ itself."""
    x_p, x_h, target = rows(12, 4, 1), rows(9, 4, 2), rows(12, 1, 3)
    theta, head = rows(4, 4, 4).requires_grad_(True), rows(4, 1, 5)
    inverses = [InverseMoment.of_features(x) for x in (x_p, x_h)]
    loss = (x_p @ theta @ head - target).square().mean()
    well = well_conditioned(second_moment_spectrum(x_p @ precondition(theta, inverses[0]), centered=False))
    ill = ill_conditioned(second_moment_spectrum(x_h @ precondition(theta, inverses[1]), centered=False))
    (loss + 2 * well + 3 * ill).backward()
    parts = []
    for x, regularizer in ((x_p, well_conditioned), (x_h, ill_conditioned)):
        again = theta.detach().clone().requires_grad_(True)
        regularizer(second_moment_spectrum(x @ again, centered=False)).backward()
        parts.append(torch.linalg.solve(x.T @ x / len(x), again.grad))
    plain = theta.detach().clone().requires_grad_(True)
    (x_p @ plain @ head - target).square().mean().backward()
    torch.testing.assert_close(theta.grad, plain.grad + 2 * parts[0] + 3 * parts[1])


def test_preconditioned_linear_is_the_layer_with_another_weight_gradient():
    layer = torch.nn.Linear(4, 3)
    inputs = rows(10, 4).float().requires_grad_(True)
    other = inputs.detach().clone().requires_grad_(True)
    out = preconditioned_linear(inputs, layer.weight, layer.bias)
    torch.testing.assert_close(out, linear(inputs, layer.weight, layer.bias))
    out.square().sum().backward()
    got_weight, got_bias = layer.weight.grad.clone(), layer.bias.grad.clone()
    layer.zero_grad()
    layer(other).square().sum().backward()
    torch.testing.assert_close(inputs.grad, other.grad)
    torch.testing.assert_close(got_bias, layer.bias.grad)
    moment = other.detach().double().T @ other.detach().double() / 10
    torch.testing.assert_close(got_weight.double(), layer.weight.grad.double() @ torch.linalg.inv(moment), rtol=1e-4,
                               atol=1e-4)  # fmt: skip
    assert got_weight.dtype == torch.float32


def test_shapes_and_values_that_cannot_work_are_refused():
    inverse = InverseMoment.of_moment(torch.eye(4))
    with pytest.raises(SpectrumError, match="input side of width 4"):
        precondition(torch.ones(3, 2), inverse)
    with pytest.raises(SpectrumError, match="weight_layout=True"):
        precondition(torch.ones(4, 3), inverse, weight_layout=True)
    with pytest.raises(SpectrumError, match="4 rows"):
        inverse.apply(torch.ones(3, 3))
    with pytest.raises(SpectrumError, match="ridge >= 0"):
        InverseMoment.of(factor_features(torch.eye(2)), ridge=-1.0)
