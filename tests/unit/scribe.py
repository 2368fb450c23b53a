"""A generator of the data stage that writes what a test says."""

import random
from contextlib import contextmanager

from transformers import GenerationConfig

from llmc_faq_slider.faq.generators import GeneratorSource
from llmc_faq_slider.faq.sampling import Draw
from llmc_faq_slider.faq.settings import GateLimits, Sampling, Settings

SETTINGS = Settings(
    num_candidates=2,
    num_samples=4,
    sequence_length=64,
    sampling=Sampling(1.0, 1.0, 0, 40),
    batch_size=4,
    gates=GateLimits(min_response_tokens=4),
    retries=0,
)


class Scribe:
    """Writes random ids unless told otherwise; keeps the requests.

    :param length: random ids of an answer, before the end id
    """

    def __init__(self, end_id, length):
        self.end_id, self.length = end_id, length
        self.write = self.random
        self.requests = []
        self.limits = []
        self.opened = 0

    def random(self, request):
        draw = random.Random(request.seed)
        ids = [draw.randrange(300, 2000) for _ in range(self.length)]
        return Draw([*ids, self.end_id], True, [-draw.random()] * (self.length + 1))

    def answer(self, requests, sampling, on_step, on_draw):
        self.requests += requests
        self.limits.append(sampling.max_new_tokens)
        on_step(0.5)
        for position, request in enumerate(requests):
            on_draw(position, self.write(request))

    @contextmanager
    def open(self):
        self.opened += 1
        yield self


def source(tokenizer, scribe, **changes) -> GeneratorSource:
    facts = {
        "identity": {"kind": "test", "weights": "0"},
        "tokenizer": tokenizer,
        "end_ids": frozenset({scribe.end_id}),
        "context_length": None,
        "defaults": GenerationConfig(),
        "open": scribe.open,
    }
    return GeneratorSource(**{**facts, **changes})
