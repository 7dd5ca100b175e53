"""How long a person waits for `caddie`: medians over fresh processes, as ratios to a bare interpreter.

python benchmarks/startup.py [WORKSPACE]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

REPEATS = 9


def main() -> None:
    verbs = [["--help"], ["schema"]]
    if len(sys.argv) > 1:
        verbs += [[verb, "--workspace", sys.argv[1], "--json"] for verb in ("best", "runs", "heartbeats")]
    bare = median_seconds([sys.executable, "-c", "pass"])
    print(f"{'bare python':<24} {bare:.3f} s")
    for verb in verbs:
        seconds = median_seconds([sys.executable, "-m", "agent", *verb])
        print(f"{'caddie ' + verb[0]:<24} {seconds:.3f} s  {seconds / bare:.1f}x")


def median_seconds(argv: list[str]) -> float:
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
