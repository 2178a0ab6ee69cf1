"""Compose params.yaml and conf/ into resolved.yaml, the one file that the other stages read.

dvc repro config                      # writes resolved.yaml
python -m stages.config scale=gpu     # prints what it would be, changes nothing
python -m stages.config --explain pretrain.steps     # prints the value and the file that it comes from
"""

import os
import sys

from stages.artifacts import ROOT, Refusal, write_atomically
from stages.composing import compose, explain
from stages.settings import as_yaml, validate

HEADER = "# Written by stages/config.py from params.yaml and conf/: edit those, then dvc repro.\n"


def main(overrides=()):
    if overrides[:1] == ["--explain"] and len(overrides) > 1:
        print(explain(overrides[1], overrides[2:]))
        return
    if any(override.startswith("-") for override in overrides):
        raise Refusal(f"{' '.join(overrides)}: usage: python -m stages.config [--explain key] [key=value ...]")
    plain = compose(overrides)
    validate(plain)
    if "DVC_STAGE" in os.environ:
        write_atomically(ROOT / "resolved.yaml", HEADER + as_yaml(plain))
    else:
        print(as_yaml(plain), end="")  # by hand nothing of DVC's is touched


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Refusal as refusal:
        sys.exit(f"offramp: {refusal}")
