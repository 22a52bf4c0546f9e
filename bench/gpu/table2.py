"""Stage 4: the paper's Table 2, VGG11 and VGG16 on CIFAR-10 for 300 epochs, by SGD and by HTA; then more seeds.

The trainer's own folders keep what is done: a call goes on where the last one was stopped, after any batch.
"""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hta_fused.train import Settings, Trainer, data
from hta_fused.train.folder import Folder
from hta_fused.train.report import summarise
from hta_fused.train.settings import PAPER

from .session import Part, Result, Session

MODELS, SEEDS = ("vgg11", "vgg16"), 3
FULL = replace(PAPER, precision="bf16")
TINY = Settings(dataset="synthetic", width=0.0625, epochs=4, L_start=0.01, L_stop=0.009, batch_size=64, seeds=1)


def parts(session: Session) -> dict[str, Part]:
    seeds = 1 if session.rehearsal else SEEDS
    return {f"{model}, seed {seed}": partial(train, session, model, seed) for seed in range(seeds) for model in MODELS}


def folder_of(session: Session, model: str, seed: int) -> Path:
    return session.out / "table2" / f"{model}-seed{seed}"


def clear(out: Path) -> None:
    shutil.rmtree(out / "table2", ignore_errors=True)


def train(session: Session, model: str, seed: int) -> Result:
    """SGD, SGD at equal work, HTA: as far as they get before the stage is to stop."""
    folder = folder_of(session, model, seed)
    chosen: dict[str, Any] = dict(model=model, seed=seed, data_dir=session.data_dir, device=session.device, out=folder)
    settings = replace(TINY if session.rehearsal else FULL, **chosen)
    lines: list[str] = []

    def report(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    callbacks: dict[str, Any] = {"stop": lambda: session.asked_to_stop, "report": report}
    session.polls = True
    try:
        if not session.rehearsal:
            data.load("cifar10", session.data_dir)
        if Folder.begun(folder):
            here = {"data_dir": session.data_dir, "device": session.device}
            trainer = Trainer.resume(folder, here, **callbacks)
        else:
            trainer = Trainer(settings, **callbacks)
        try:
            finished = trainer.train()
        except ModuleNotFoundError as error:  # for the picture, after the last run
            print(f"{error.name} is not installed: no picture", flush=True)
            finished = trainer.done == len(trainer.jobs)
    except FileNotFoundError as error:
        return {"skipped": str(error)}
    finally:
        session.polls = False
    runs = summarise(trainer.rows, trainer.settings, trainer.fingerprint, len(trainer.images.test))["runs"]
    wanted = {job.label: job.epochs for job in trainer.jobs}
    rows = {label: {"epochs": f"{run['epochs']} of {wanted[label]}", "test accuracy, %": f"{run['accuracy_mean']:.2f}",
                    "images/s": f"{run['images_per_second']:.0f}"} for label, run in runs.items()}  # fmt: skip
    result: Result = {"rows": rows, "runs": runs, "uncaptured": [line for line in lines if "no CUDA graph" in line]}
    if not finished:
        return {**result, "unfinished": f"stopped {trainer.place}"}
    return {**result, "passed": not result["uncaptured"]}
