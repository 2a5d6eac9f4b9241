"""What several test files need."""

import json
import os
from pathlib import Path
from typing import Any

# Before torch is imported: for tiny models a second thread is all overhead, most of all beside Ray's workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from jobs.engine.loading import load_replica
from jobs.engine.replica import Replica
from jobs.spec import ModelRef
from tests.command import SPACE, run_arguments, steersweep_beside_other_code
from tests.models import save_tiny

# The same examples every time: a run says something about the change, not about luck.
settings.register_profile("steersweep", deadline=None, derandomize=True, database=None)
settings.load_profile("steersweep")


@pytest.fixture(scope="session")
def smollm2() -> Replica:
    """The small real model, float32; `make install` puts it on the machine."""
    return load_replica(ModelRef(id="smollm2-135m"))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tiny model and a space, for the command."""
    folder = tmp_path_factory.mktemp("command")
    save_tiny(folder / "model")
    (folder / "space.py").write_text(SPACE)
    return folder


@pytest.fixture(scope="session")
def finished(place: Path) -> dict[str, Any]:
    """What the command said of a sweep in `place / "finished"`."""
    done = steersweep_beside_other_code(place / "elsewhere", *run_arguments(place, "finished"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
