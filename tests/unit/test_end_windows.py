import pytest
import torch
from torch import nn

from llmc_faq_slider.slider.end_windows import end_windows

pytestmark = pytest.mark.unit


def ends(shallow: int | None, deep: int | None, layers: int) -> tuple[int, int]:
    modules: list[nn.Module] = [nn.Identity()] * layers
    device = torch.device("cpu")
    return end_windows(shallow, deep, nn.Identity(), modules, [], {}, device)


@pytest.mark.parametrize(
    ("layers", "count"), [(1, 1), (2, 1), (8, 2), (15, 3), (16, 4), (30, 4), (80, 4)]
)
def test_default_is_the_papers_but_at_most_a_quarter_of_the_layers(layers, count):
    assert ends(None, None, layers) == (count, count)


def test_numbers_that_are_given_stay():
    assert ends(4, None, 8) == (4, 2)
    assert ends(None, 0, 8) == (2, 0)
