"""Before the first test: what the imports of all tests have left is not searched for garbage."""

import gc
import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    # statsmodels collects garbage at each correction of p-values, which among the objects of all
    # packages that the tests import takes half a second
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    # or Triton's bindings say at the end that their objects leak
    gc.unfreeze()
