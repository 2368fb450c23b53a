"""What the end-to-end tests share: the serving environment and what is slow to make."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from benchmarks.prove_serving import (
    NEW_TOKENS,
    RECIPES,
    Trained,
    family_rows,
    local_target,
    prompts_of,
    train,
)
from benchmarks.served import Answer, make_probes, run_vllm
from llmc_faq_slider.report.server import Server, serve

SERVE_ENV = Path(__file__).parents[2] / ".venv-serve"
# Each kernel of vLLM for the CPU once, then two formats that it has none for.
PROVEN = (
    "slider_w4a16_asym",
    "faq_slider_w4a8",
    "faq_slider_w4a8_cpu",
    "slider_w4a4",
    "slider_w8a8",
    "faq_slider_w4afp8",
    "slider_w2a16",
)
CALIBRATION_ROWS, COMPARED_ROWS, ROW_LENGTH, EPOCHS = 16, 6, 128, 2


@pytest.fixture(scope="session")
def serve_env() -> Path:
    unsupported = SERVE_ENV / "unsupported"
    if unsupported.exists():
        pytest.skip(unsupported.read_text().strip())
    assert (SERVE_ENV / ".ready").exists(), "run `make serve-env` first"
    return SERVE_ENV


@pytest.fixture(scope="session")
def sibling_server(
    serve_env: Path, large_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The larger model of the tiny family behind vLLM."""
    log = tmp_path_factory.mktemp("sibling") / "vllm.log"
    with serve(large_model, serve_env, log, timeout=1800) as server:
        yield server


@dataclass(frozen=True)
class Proven:
    """
    Models that recipes quantised, and what vLLM makes of those it serves here.

    What failed at one recipe is raised where that recipe is asked for.
    """

    made: dict[str, Trained | Exception]
    answers: dict[str, Answer | RuntimeError]
    rows: Tensor

    def trained(self, recipe: str) -> Trained:
        made = self.made[recipe]
        if isinstance(made, Exception):
            raise made
        return made

    def answer(self, recipe: str) -> Answer:
        """vLLM's, or the test is skipped: it has no kernel for the format here."""
        trained = self.trained(recipe)
        for serving in trained.servings:
            if not serving.served:
                pytest.skip(f"{recipe} on {serving.target.name}: {serving.why}")
        answer = self.answers[recipe]
        if isinstance(answer, RuntimeError):
            raise answer
        return answer


@pytest.fixture(scope="session")
def proven(
    serve_env: Path, small_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Proven:
    folder = tmp_path_factory.mktemp("proven")
    calibration = family_rows(small_model, CALIBRATION_ROWS, ROW_LENGTH, half=0)
    rows = family_rows(small_model, COMPARED_ROWS, ROW_LENGTH, half=1)
    made: dict[str, Trained | Exception] = {}
    for name in PROVEN:
        try:
            made[name] = train(
                str(small_model),
                RECIPES / f"{name}.yaml",
                calibration,
                rows,
                folder,
                epochs=EPOCHS,
                target=local_target(),
            )
        except Exception as error:
            made[name] = error
    served = {
        name: one
        for name, one in made.items()
        if isinstance(one, Trained) and one.computes is not None
    }
    answers = run_vllm(
        [one.checkpoint for one in served.values()],
        rows,
        prompts_of(rows),
        NEW_TOKENS,
        make_probes(next(iter(served.values())).linears) if served else {},
        folder / "vllm",
        serve_env,
    )
    return Proven(made, dict(zip(served, answers, strict=True)), rows)
