"""Settings of every test: one thread, fixed seeds, no model hub."""

from __future__ import annotations

import os
import random
from pathlib import Path

# Before torch and the Hugging Face libraries are imported: they read these once. One
# thread, so that results do not depend on the machine and tests run next to other work.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Numbers are those of the CPU; `make test-gpu` names a GPU and runs tests/gpu.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import generated  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from transformers import AutoTokenizer, PreTrainedTokenizerBase  # noqa: E402

TESTS = Path(__file__).parent


# --hypothesis-profile is read later and wins.
settings.load_profile("test")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--least-cases",
        type=int,
        default=0,
        help="fail if fewer generated cases than these ran",
    )


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    least = session.config.getoption("--least-cases")
    if exitstatus == 0 and generated.PASSED.total() < least:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if generated.PASSED:
        least = config.getoption("--least-cases")
        terminalreporter.section("generated cases")
        for test, number in sorted(generated.PASSED.items()):
            terminalreporter.line(f"{number:7d}  {test}")
        total = f"{generated.PASSED.total():7d}  in all"
        terminalreporter.line(total + (f", at least {least} wanted" if least else ""))


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps what the data stage stores out of the home folder and of other runs."""
    os.environ["LLMC_FAQ_SLIDER_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_model() -> Path:
    """The smaller model of the tiny family."""
    return TESTS / "models" / "small"


@pytest.fixture(scope="session")
def large_model() -> Path:
    """The larger sibling, with the same tokenizer."""
    return TESTS / "models" / "large"


@pytest.fixture(scope="session")
def tokenizer(small_model: Path) -> PreTrainedTokenizerBase:
    """The family's; not to be changed."""
    return AutoTokenizer.from_pretrained(small_model)
