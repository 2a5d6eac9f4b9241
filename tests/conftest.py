"""What several test files need."""

import os

# Before torch is imported: for tiny models a second thread is all overhead, most of all beside Ray's workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from jobs.engine.loading import load_replica
from jobs.engine.replica import Replica
from jobs.spec import ModelRef

# The same examples every time: a run says something about the change, not about luck.
settings.register_profile("steersweep", deadline=None, derandomize=True, database=None)
settings.load_profile("steersweep")


@pytest.fixture(scope="session")
def smollm2() -> Replica:
    """The small real model, float32; `make install` puts it on the machine."""
    return load_replica(ModelRef(id="smollm2-135m"))
