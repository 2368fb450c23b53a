"""The serving environment, which `make serve-env` makes beside the tests' own."""

from pathlib import Path

import pytest

SERVE_ENV = Path(__file__).parents[2] / ".venv-serve"


@pytest.fixture(scope="session")
def serve_env() -> Path:
    unsupported = SERVE_ENV / "unsupported"
    if unsupported.exists():
        pytest.skip(unsupported.read_text().strip())
    assert (SERVE_ENV / ".ready").exists(), "run `make serve-env` first"
    return SERVE_ENV
