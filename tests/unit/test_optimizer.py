import pytest
import torch

from llmc_faq_slider.slider.optimizer import SignDescent

pytestmark = pytest.mark.unit


def test_steps_have_one_size_whatever_the_gradient():
    offset = torch.zeros(3, requires_grad=True)
    optimizer = SignDescent([offset], lr=0.125)
    offset.grad = torch.tensor([1e-6, -1e6, 0.0])
    optimizer.step()
    assert offset.tolist() == [-0.125, 0.125, 0.0]


def test_offsets_stay_within_half_a_step():
    offset = torch.zeros(2, requires_grad=True)
    optimizer = SignDescent([offset], lr=0.2)
    for _ in range(9):
        offset.grad = torch.tensor([1.0, -1.0])
        optimizer.step()
    assert offset.tolist() == [-0.5, 0.5]


def test_decaying_rates_add_up_to_the_travel_asked_for():
    steps, travel = 10, 0.4
    offset = torch.zeros(1, requires_grad=True)
    optimizer = SignDescent([offset], lr=2 * travel / steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / steps)
    for _ in range(steps):
        offset.grad = torch.ones(1)
        optimizer.step()
        schedule.step()
    assert offset.item() == pytest.approx(-travel * (steps + 1) / steps)
