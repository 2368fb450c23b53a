import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc_faq_slider.slider.optimizer import ScaledDescent, linear_decay

pytestmark = pytest.mark.unit


def matrix(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, requires_grad=True)


@given(st.lists(st.integers(-18, 18), min_size=3, max_size=3))
def test_first_steps_have_one_size_whatever_the_gradient(powers):
    offset = matrix([0.0, 0.0, 0.0])
    optimizer = ScaledDescent([offset], lr=0.125)
    signs = torch.tensor([[1.0, -1.0, 1.0]])
    offset.grad = torch.tensor([[10.0**power for power in powers]]) * signs
    optimizer.step()
    torch.testing.assert_close(offset.detach(), -0.125 * signs)


def test_elements_move_by_their_gradients_over_their_usual_sizes():
    offset = torch.zeros(2, 2, requires_grad=True)
    optimizer = ScaledDescent([offset], lr=1e-3)
    sizes = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    grads = [sizes * factor for factor in (1.0, -2.0, 3.0, 0.5)]
    for grad in grads:
        offset.grad = grad
        before = offset.detach().clone()
        optimizer.step()
    weights = [0.9**age for age in (3, 2, 1, 0)]
    squares = [
        weight * grad.square() for weight, grad in zip(weights, grads, strict=True)
    ]
    usual = (sum(squares) / sum(weights)).sqrt()
    torch.testing.assert_close(before - offset.detach(), 1e-3 * grads[-1] / usual)


def test_elements_without_gradient_stay():
    offset = matrix([0.25, 0.25])
    optimizer = ScaledDescent([offset], lr=0.125)
    for grad in ([0.0, 1.0], [0.0, 0.0]):
        offset.grad = torch.tensor([grad])
        optimizer.step()
        assert offset.tolist() == [[0.25, 0.125]]


def test_offsets_stay_within_half_a_step():
    offset = matrix([0.0, 0.0])
    optimizer = ScaledDescent([offset], lr=0.2)
    for _ in range(9):
        offset.grad = torch.tensor([[1.0, -1.0]])
        optimizer.step()
    assert offset.tolist() == [[-0.5, 0.5]]


def test_decaying_rates_add_up_to_the_travel_asked_for():
    steps, travel = 10, 0.4
    offset = matrix([0.0])
    optimizer = ScaledDescent([offset], lr=2 * travel / steps)
    schedule = linear_decay(optimizer, steps)
    for _ in range(steps):
        offset.grad = torch.ones(1, 1)
        optimizer.step()
        schedule.step()
    assert offset.item() == pytest.approx(-travel * (steps + 1) / steps)
