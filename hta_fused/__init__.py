"""Coupled copies of a neural network, whose optimizer's step costs its memory traffic. The public names, and nothing else."""

from . import couplings, path, problems, proposals, schedule, tables
from .couplings import EMA, Average, Elastic, Explicit, Homotopy, Lookahead, Parle, Toward
from .kernels import backends, use_backend
from .layout import Layout
from .ops import coupled_step_, homotopy_penalty, homotopy_penalty_accumulate_, homotopy_step_
from .optim import CoupledOptimizer, HomotopySGD, StepStats
from .partition import Partition
from .proposals import SGD, AdamW
from .replicas import Replicas
from .schedule import CouplingScheduler

__version__ = "0.2.0"  # the only definition: pyproject.toml reads it

__all__ = [
    "EMA",
    "SGD",
    "AdamW",
    "Average",
    "CoupledOptimizer",
    "CouplingScheduler",
    "Elastic",
    "Explicit",
    "Homotopy",
    "HomotopySGD",
    "Layout",
    "Lookahead",
    "Parle",
    "Partition",
    "Replicas",
    "StepStats",
    "Toward",
    "backends",
    "coupled_step_",
    "couplings",
    "homotopy_penalty",
    "homotopy_penalty_accumulate_",
    "homotopy_step_",
    "path",
    "problems",
    "proposals",
    "schedule",
    "tables",
    "use_backend",
]
