"""Callbacks and loggers of conf/callbacks and conf/logger, built in a rank for each fit by hydra.utils.instantiate.

They watch; what a rank promises is in stages/training/callbacks.py, and those run whatever is chosen here.
"""

import traceback
from pathlib import Path
from typing import Any

from torch import Tensor

from stages.files.artifacts import Refusal, checkout_root
from stages.run.entry import Place

EXTRA = "pip install -e '.[loggers]'"  # of pyproject.toml


def build(group: str, kind: type, wanted: dict[str, dict[str, Any]], facts: dict[str, str]) -> dict[str, Any]:
    """The objects that the settings of a group (callbacks or logger) name, in their order, by "group.name".

    `facts` stand for ${run:...}: folder, stage and fit. A Refusal names what cannot be built, or is not of this kind.
    """
    if not wanted:
        return {}
    import hydra  # late: it costs a rank that nobody watches a fifth of a second
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("run", facts.__getitem__, replace=True)
    built = {}
    for name, entry in wanted.items():
        try:
            one = hydra.utils.instantiate(OmegaConf.create(entry), _convert_="all")
        except Exception as error:  # whatever a constructor raises
            raise Refusal(f"{group}.{name}: {entry['_target_']} cannot be built: {_reason(error)}") from None
        if not isinstance(one, kind):
            made = f"{entry['_target_']} makes a {type(one).__name__}"
            raise Refusal(f"{group}.{name}: {made}: it must be a {kind.__name__} of lightning.pytorch")
        built[f"{group}.{name}"] = one
    return built


def at_fault(error: BaseException, built: dict[str, Any]) -> str:
    """The name of the object in a method of which the error was raised; empty where it was elsewhere."""
    names = {id(one): name for name, one in built.items()}
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return next((names[id(it)] for frame in frames if id(it := frame.f_locals.get("self")) in names), "")


def _reason(error: BaseException) -> str:
    """The innermost error in one line; a package that is missing comes with the command that installs it."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, ModuleNotFoundError):
        own = f", or pip install {error.name.partition('.')[0]}" if error.name else ""
        return f"{text.rstrip('.')}; {EXTRA}{own}"
    return text


def log_folder(place: Place, stage: str) -> Path:
    """Where ${run:folder} is: in the folder of a run by hand, or under outputs/ of the checkout; never a DVC out."""
    if place.out != place.root:
        return place.out / "logs"
    return checkout_root(place.root) / "outputs" / stage / "dvc"


# ---- what conf/callbacks/throughput.yaml counts by; a batch is [B, T + 1]


def sequences(tokens_BT1: Tensor) -> int:
    return tokens_BT1.shape[0]


def tokens(tokens_BT1: Tensor) -> int:
    return tokens_BT1.shape[0] * (tokens_BT1.shape[1] - 1)
