"""What the tests of the learning loop share."""

import torch

from llmc_faq_slider.slider.learner import LearningSettings, learn_windows
from llmc_faq_slider.slider.quantizer import ActivationGrid, WeightGrid
from llmc_faq_slider.slider.stream import capture_decoder
from llmc_faq_slider.slider.student import LinearGrids
from llmc_faq_slider.slider.windows import window_schedule

LINEARS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
CPU = torch.device("cpu")


def settings(**changes):
    values = dict(
        ratio=0.5,
        epochs=4,
        batch_size=4,
        low_rank=2,
        rounding_travel=0.2,
        channel_scales=True,
        smoothing_strength=0.5,
        learning_rates={"low_rank": 1e-3, "clipping": 1e-2, "channel_scale": 1e-3},
        visit_decay=0.0,
        compute_dtype=torch.float32,
        seed=0,
    )
    return LearningSettings(**(values | changes))


def learn(model, rows, **changes):
    layers = list(model.model.layers)
    hidden, calls = capture_decoder(model, layers, rows, CPU)
    grids = LinearGrids(WeightGrid(2, True, 16, torch.float32), ActivationGrid(8))
    committed = []
    learned = learn_windows(
        calls,
        hidden,
        {i: dict.fromkeys(LINEARS, grids) for i in range(len(layers))},
        window_schedule(len(layers)),
        settings(**changes),
        CPU,
        lambda index, folded: committed.append((index, folded)),
    )
    return learned.windows, committed


def rows_of(lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (n,), generator=generator) for n in lengths]
