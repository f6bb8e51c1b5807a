"""Seconds and memory of a match, measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

__all__ = ["cost_of"]

COST = """
import time, torch
from overpaint.match import Matcher, dense
torch.set_num_threads({threads})
matcher = Matcher.load({folder!r})
pictures = torch.rand(2, 3, 512, 512, generator=torch.Generator().manual_seed(0))
seconds = []
for _ in range({runs}):
    start = time.perf_counter()
    dense(pictures[0], pictures[1], matcher=matcher)
    seconds.append(time.perf_counter() - start)
peak = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(sorted(seconds)[len(seconds) // 2], seconds[0], peak / 2**20)
"""


def cost_of(folder: Path, runs: int, threads: int) -> dict[str, float]:
    """Return the seconds of a match at 512x512 and the peak resident GiB, measured in a process of its own.

    Its stderr is that of this process.
    """
    run = COST.format(folder=str(folder), runs=runs, threads=threads)
    process = subprocess.run(
        [sys.executable, "-c", run], stdout=subprocess.PIPE, text=True, check=True
    )
    median, first, peak = (float(v) for v in process.stdout.split())
    return {"seconds_512": median, "seconds_512_first": first, "peak_gib_512": peak}
