"""What a benchmark ran on, and how fast that machine can multiply."""

import os
import platform
import re
import time
from pathlib import Path

import torch


def describe() -> str:
    """Processor, cores, memory and library versions in one line."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{_processor()}, {torch.get_num_threads()} threads, {memory_gib:.0f} GiB, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return names[0] if names else platform.processor()


def gemm_ceiling(
    dtype: torch.dtype, *, inputs: int, outputs: int, device: str = "cpu", seconds: float = 0.5
) -> float:
    """Most floating-point operations a second that a matrix product of the model's shape reaches.

    Args:
        dtype: Of both factors.
        inputs: Width that is multiplied.
        outputs: Width of the result.
        device: Where.
        seconds: How long each number of rows is tried.
    """
    weight = torch.randn((outputs, inputs), device=device).to(dtype)
    best = 0.0
    for rows in (64, 128, 256, 512, 1024):
        batch = torch.randn((rows, inputs), device=device).to(dtype)
        torch.nn.functional.linear(batch, weight)
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            before = time.perf_counter()
            for _ in range(8):
                torch.nn.functional.linear(batch, weight)
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 8 * 2 * rows * inputs * outputs / (time.perf_counter() - before))
    return best
