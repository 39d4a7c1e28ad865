"""The largest memory of a process of its own."""

from __future__ import annotations

import subprocess
import sys

_PEAK = """
import pathlib, resource, sys
status = pathlib.Path("/proc/self/status")
if status.exists():
    peak_kib = int(status.read_text().partition("VmHWM:")[2].split()[0])
else:
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
print(peak_kib / 1024)
"""
# On Linux `ru_maxrss` outlives exec: a small process that a large one starts says what the large one had.


def peak_mib(code: str) -> float:
    """Largest resident memory, in MiB, of a new Python process that runs `code`, its imports included.

    Raises subprocess.CalledProcessError where the code fails.
    """
    result = subprocess.run([sys.executable, "-c", code + _PEAK], stdout=subprocess.PIPE, text=True, check=True)
    return float(result.stdout.split()[-1])
