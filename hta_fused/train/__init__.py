"""Training VGG by homotopy beside SGD: hta-train. What other packages use of it."""

from .comparison import Trainer
from .run import Job, Run
from .settings import PAPER, Settings

__all__ = ["PAPER", "Job", "Run", "Settings", "Trainer"]
