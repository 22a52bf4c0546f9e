"""The bytes that a step moves, by the card's own counters (Nsight Compute), beside the formula of what it has to.

python -m bench.gpu.counters BACKEND DEVICE BYTES     what ncu watches: two steps of each workload
"""

import csv
import math
import shutil
import sys
from collections import defaultdict
from itertools import product

import torch

import hta_fused as hta

from .. import measure, workloads
from .session import LEFT_OUT, Result, Session, default_device, outcome_of_tool, program, run, tail

CASES = list(product(("SGD", "AdamW"), (1, 2, 4, 8)))
METRICS = "dram__bytes_read.sum,dram__bytes_write.sum"
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def needed(proposal: str, m: int) -> int:
    """Bytes an element, in float32 with an anchor: README, The mathematics."""
    return 4 * ((5 if proposal == "SGD" else 7) * m + 1)


def elements_of(proposal: str, m: int, total: int) -> int:
    return max(1024, total // needed(proposal, m))


def dram(session: Session, backend: str) -> Result:
    tool = shutil.which("ncu")
    if tool is None:
        return {"skipped": "Nsight Compute (ncu) is not on the PATH"}
    total = 10**6 if session.rehearsal else 6 * 10**9  # far beyond any cache
    command = [tool, "--clock-control", "none", "--csv", "--print-units", "base", "--metrics", METRICS,
               "-k", "regex:step_kernel", *program("counters", backend, session.device, total)]  # fmt: skip
    status, output = run(command)
    launches = dram_bytes(output)
    if status or len(launches) != 2 * len(CASES):
        result = outcome_of_tool(status, output)
        return (
            result if "skipped" in result else {"passed": False, "output": f"{len(launches)} launches\n{tail(output)}"}
        )
    counted = {case: n / elements_of(*case, total) for case, n in zip(CASES, launches[1::2], strict=True)}
    rows = {f"{proposal}, m = {m}": {"bytes/element, counted": f"{counted[proposal, m]:.1f}",
                                     "needed": f"{needed(proposal, m)}"} for proposal, m in CASES}  # fmt: skip
    claims = [measure.claim(f"|DRAM bytes over what {p}, m = {m} needs - 1|", abs(counted[p, m] / needed(p, m) - 1), 0.03, "at most")
              for p, m in CASES]  # fmt: skip
    return {"rows": rows, "counted": {f"{p}, m = {m}": v for (p, m), v in counted.items()}, **session.judged(claims)}


def dram_bytes(output: str) -> list[float]:
    """Each launch's sum of the DRAM metrics in ncu's CSV."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    sums: defaultdict[int, float] = defaultdict(float)
    for row in csv.DictReader(lines[start:]):
        if (row["Metric Name"] or "").startswith("dram__bytes"):
            sums[int(row["ID"])] += float(row["Metric Value"].replace(",", "")) * UNITS.get(
                row["Metric Unit"], math.nan
            )
    return [sums[launch] for launch in sorted(sums)]


def main(backend: str, device: str, total: str) -> None:
    state = hta.backends()[backend]
    if not state.startswith("available"):
        print(f"{backend}: {state}")
        sys.exit(LEFT_OUT)
    hta.use_backend(backend)
    with default_device(device):
        for proposal, m in CASES:
            step = workloads.flat(elements_of(proposal, m, int(total)), copies=m, proposal=proposal).optimizer.step
            step()
            step()
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
