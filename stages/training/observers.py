"""Callbacks and loggers of conf/callbacks and conf/logger, built in a rank for each fit by hydra.utils.instantiate.

They watch; what a rank promises is in stages/training/callbacks.py, and those run whatever is chosen here.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from stages.files.artifacts import Refusal, checkout_root
from stages.run.entry import Place

EXTRA = "pip install -e '.[loggers]'"  # of pyproject.toml


def build(group: str, wanted: dict[str, dict[str, Any]], facts: dict[str, str]) -> list[Any]:
    """The objects that the settings of a group (callbacks or logger) name, in their order.

    `facts` stand for ${run:...}: folder, stage and fit. A Refusal names what cannot be built and why.
    """
    if not wanted:
        return []
    import hydra  # late: it costs a rank that nobody watches a fifth of a second
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("run", facts.__getitem__, replace=True)
    built = []
    for name, entry in wanted.items():
        try:
            built.append(hydra.utils.instantiate(OmegaConf.create(entry), _convert_="all"))
        except Exception as error:  # whatever a constructor raises
            raise Refusal(f"{group}.{name}: {entry['_target_']} cannot be built: {_reason(error)}") from None
    return built


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
