"""What a run exports, the state_dict of a plain VGG, tested again."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import data
from .run import batches_of, evaluate, network
from .settings import Settings


def evaluate_file(file: Path, settings: Settings) -> tuple[float, float]:
    """Loads an exported state_dict into the plain VGG of the settings and returns its test loss and accuracy (in %).

    Raises:
        OSError: the file cannot be read.
        ValueError: the file holds something else; the message names it.
    """
    wanted = f"a state_dict of {settings.model} at width {settings.width:g}, as a run exports it, is expected"
    if file.is_dir():
        raise ValueError(f"{file} is a folder, where {wanted}")
    content = io.BytesIO(file.read_bytes())
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever an unpickler finds
        raise ValueError(f"{file} is no file that torch.save wrote, where {wanted}") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) and not t.is_nested for t in state.values()):
        hint = f" (it is a checkpoint: --resume {file.parent})" if isinstance(state, dict) and "rows" in state else ""
        raise ValueError(f"{file} holds no state_dict, where {wanted}{hint}")
    model = network(settings)
    for name, tensor in model.state_dict().items():
        theirs = _described(state[name]) if name in state else ("missing",)
        for held, own in zip(theirs, _described(tensor.cpu()), strict=False):
            if held != own:
                raise ValueError(f"{file} holds another network: {name} is {held}, not {own}; {wanted}")
    for name in state.keys() - model.state_dict().keys():
        raise ValueError(f"{file} holds another network: {name} is none of its tensors; {wanted}")
    model.load_state_dict(state)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    images = data.load(settings.dataset, settings.data_dir, settings.download)
    return evaluate(model, batches_of(images, settings, settings.seed), settings)


def _described(tensor: Tensor) -> tuple[Any, ...]:
    """What must be as the network's: load_state_dict fails for some of it, and converts the rest without a word."""
    return tuple(tensor.shape), tensor.dtype, tensor.layout, tensor.device.type
