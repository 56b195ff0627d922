"""Before any test module: Ray's bounds, which it reads when it is imported, and no time limits of hypothesis."""

import logging
from collections.abc import Iterator

import hypothesis
import pytest

from dcpo_openrlhf import local_ray

local_ray.raise_bounds()
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def no_log_goes_to_the_stream_of_an_earlier_test() -> Iterator[None]:
    """A command under test sends its log to the stderr of then, which pytest closes."""
    yield
    root = logging.getLogger()
    for handler in [h for h in root.handlers if type(h) is logging.StreamHandler]:
        root.removeHandler(handler)
