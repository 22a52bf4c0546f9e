"""What the GPU's step is compiled to: registers, and instructions in the loop over 16-byte groups. Needs no GPU.

    python -m bench.machine_code [--archs sm_60 sm_70 sm_80 sm_90]

NVRTC compiles csrc/gpu/kernels.cuh; cuobjdump, which Triton's wheel brings, takes it apart. The count is static: the
whole body of the loop, with what only tiles of mixed labels or hashed ones run, over the elements of a group.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from hta_fused.kernels import nvrtc

KERNELS = {
    (proposal, m): f"hta::gpu::step_kernel<float, float, hta::{proposal}, {held}, false>"
    for proposal in ("Sgd", "AdamW")
    for m, held in ((1, 2), (2, 2), (4, 4), (8, 8), (16, 0))
}
ELEMENTS = 4  # of float32 in 16 bytes


def cuobjdump(cubin: bytes, option: str) -> str:
    """What Triton's cuobjdump says of a cubin."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), option, file.name]
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PATH": path}, check=True
        ).stdout


def loop(text: str) -> list[str]:
    """The instructions of the longest loop that loads 16 bytes at a time."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", text)
    code = [(int(address, 16), instruction) for address, instruction in found]
    best: list[str] = []
    for end, instruction in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) < end:
            body = [i for address, i in code if int(target[1], 16) <= address <= end]
            wide = sum("LDG" in i and "128" in i for i in body)
            best = body if wide > 1 and len(body) > len(best) else best
    return best


def table(archs: list[str]) -> str:
    lines = [
        "| proposal, copies | " + " | ".join(f"{arch}: registers, instructions an element" for arch in archs) + " |"
    ]
    lines.append("| --- |" + " ---: |" * len(archs))
    rows: dict[tuple[str, int], list[str]] = {key: [] for key in KERNELS}
    for arch in archs:
        for key, expression in KERNELS.items():
            count = ""
            _, cubin = nvrtc.compile_program([expression], arch)
            used = re.search(r"REG:(\d+)", cuobjdump(cubin, "-res-usage"))
            with suppress(subprocess.CalledProcessError):  # newer tools do not take older cards' code apart
                count = f", {len(loop(cuobjdump(cubin, '-sass'))) / ELEMENTS:.0f}"
            rows[key].append(f"{used[1] if used else '?'}{count}")
    for (proposal, m), cells in rows.items():
        lines.append(f"| {proposal}, {m} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "bench.machine_code", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archs", nargs="+", default=["sm_60", "sm_70", "sm_80", "sm_90"], metavar="ARCH")
    options = parser.parse_args(argv)
    try:
        print(f"NVRTC {'.'.join(map(str, nvrtc.version()))}\n\n{table(options.archs)}")
    except (ImportError, OSError, RuntimeError) as error:
        sys.exit("bench.machine_code: " + " ".join(str(error).split()))


if __name__ == "__main__":
    main()
