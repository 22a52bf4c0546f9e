"""Homotopy training of neural networks at the cost of its memory traffic. The public names, and nothing else."""

from . import path, problems, schedule, tables
from .ops import backends, homotopy_penalty, homotopy_penalty_accumulate_, homotopy_step_, use_backend
from .optim import HomotopySGD, StepStats
from .partition import Layout, Partition
from .replicas import Replicas

__version__ = "0.1.0"

__all__ = [
    "HomotopySGD",
    "Layout",
    "Partition",
    "Replicas",
    "StepStats",
    "backends",
    "homotopy_penalty",
    "homotopy_penalty_accumulate_",
    "homotopy_step_",
    "path",
    "problems",
    "schedule",
    "tables",
    "use_backend",
]
