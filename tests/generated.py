"""Generated test cases: how many are made, and a count of those that passed.

``@cases(number, **strategies)`` is hypothesis' ``given`` with that many cases under the
profile ``test``, and ten times as many under ``fuzz`` (``--hypothesis-profile fuzz``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

#: cases that ran to their end, by test
PASSED: Counter[str] = Counter()
_STANDARD = 100

# The same cases every time, so that a failure is due to the change at hand.
settings.register_profile("test", max_examples=_STANDARD, derandomize=True)
settings.register_profile("fuzz", max_examples=10 * _STANDARD, print_blob=True)


def cases(
    number: int, *given_strategies: SearchStrategy, **strategies: SearchStrategy
) -> Callable:
    """Run a test with ``number`` generated cases, or the profile's multiple of it."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            test(*args, **kwargs)
            PASSED[f"{test.__module__}.{test.__name__}"] += 1

        wanted = settings(
            max_examples=max(1, number * settings.default.max_examples // _STANDARD),
            deadline=None,
            suppress_health_check=[
                HealthCheck.function_scoped_fixture,
                HealthCheck.too_slow,
                HealthCheck.data_too_large,
            ],
        )
        return pytest.mark.generated(
            wanted(given(*given_strategies, **strategies)(counted))
        )

    return decorate


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` with bits flipped, bytes replaced, or its end cut off."""
    spoilt = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(spoilt) - 1))
        kind = draw(st.sampled_from(["bit", "digit", "byte", "run"]))
        if kind == "bit":
            spoilt[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "digit":
            # what turns one well-formed record into another
            spoilt[place] = ord(draw(st.sampled_from('0123456789abcdef"\n,:{} ')))
        elif kind == "byte":
            spoilt[place] = draw(st.integers(0, 255))
        else:
            run = draw(st.binary(min_size=1, max_size=8))
            spoilt[place : place + len(run)] = run
    if draw(st.integers(0, 9)) == 0:
        del spoilt[draw(st.integers(1, len(spoilt))) :]
    return bytes(spoilt)
