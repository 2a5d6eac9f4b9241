"""Runs the chaos tests, and counts who was killed and what was lost.

Run by `make chaos`; writes `benchmarks/results/chaos.json`. The tests say what they did as properties of
their reports.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.machine import describe

RESULTS = Path(__file__).parent / "results" / "chaos.json"
COUNTED = ("worker_kills", "driver_kills", "node_kills", "lost", "duplicated", "zombies")


def count(report: Path) -> tuple[Counter[str], int, int]:
    """What the tests of a JUnit report have counted, how many passed, and how many failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    counts: Counter[str] = Counter()
    for found in (each for case in cases for each in case.iter("property")):
        counts[found.attrib["name"]] += int(found.attrib["value"])
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    return counts, len(cases) - failed - skipped, failed


def main(arguments: Sequence[str]) -> int:
    """Run, write, and print one line at the end; the exit code is pytest's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options, more = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = ["-n", "2", "--dist", "worksteal", "-m", "chaos", f"--junitxml={report}", *more]
        code = subprocess.run([sys.executable, "-m", "pytest", *tests], check=False).returncode
        counts, passed, failed = count(report)
    result = {
        "machine": describe(),
        "date": date.today().isoformat(),
        "passed": passed,
        "failed": failed,
        **{name: counts[name] for name in COUNTED},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(f"{passed} passed, {failed} failed\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
