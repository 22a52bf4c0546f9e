"""Builds the C++ extension; everything else about the package stands in pyproject.toml.

Without a C++ compiler the package installs all the same, and its ops run in plain PyTorch.
"""

import os
import shutil
import sys

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "hta_fused builds against the torch it will run with: install torch, then `pip install --no-build-isolation .`"
    )

TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10: the oldest release whose stable ABI has what we call


def extensions() -> list:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        print(
            f"hta_fused: no C++ compiler ({compiler!r} is not on the PATH), so the fused kernels are left out and the "
            "slower pure-PyTorch backend will serve. Install one (g++ or clang++) and reinstall to have them.",
            file=sys.stderr,
        )
        return []
    return [
        CppExtension(
            "hta_fused._C",
            ["csrc/ops.cpp", "csrc/cpu.cpp"],
            include_dirs=["csrc"],
            depends=["csrc/homotopy.h", "csrc/kernels.h", "csrc/cpu_loops.h"],
            # No contraction into FMA: the same bits on every processor.
            extra_compile_args=[
                "-O3",
                "-g0",
                "-std=c++20",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            ],
            py_limited_api=True,
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
