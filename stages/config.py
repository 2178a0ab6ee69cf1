"""Compose params.yaml and conf/ into resolved.yaml, the one file of settings that the other stages read.

dvc repro config                      # writes resolved.yaml, and inputs.json: fingerprints of what DVC cannot see
python -m stages.config scale=gpu     # prints the settings, changes nothing
python -m stages.config --explain pretrain.steps     # prints a value and the file that it comes from
python -m stages.config --schema      # prints the JSON schema of params.yaml for editors (conf/schema.json)

DVC runs this stage at every `dvc repro`, because a corpus file, a teacher's folder or an environment value may have
changed. Where no file of settings or code has, it looks at the corpus and that folder only. The other stages run when
the settings or inputs that they read have changed.
"""

import os
import sys

from stages.data.fingerprints import INPUTS, corpus_fingerprint, read_inputs, teacher_fingerprint
from stages.data.teacher_folder import refuse_uncuttable, refuse_untrimmable, teacher_folder
from stages.files.artifacts import ROOT, Refusal, write_atomically, write_json
from stages.files.resuming import remove_recorded
from stages.files.streams import disk_refusals, fill_closed_streams, whole_output
from stages.run.experiments import remember_accepted, undo_set_params
from stages.run.unchanged import remember, unchanged_sections

HEADER = "# Written by stages/config.py from params.yaml and conf/: edit those, then dvc repro.\n"


def main(overrides=()):
    if "DVC_STAGE" in os.environ and not overrides and (known := unchanged_sections(ROOT)):
        write_json(ROOT / INPUTS, inputs_of(known))
        remove_recorded(ROOT)
        return
    from stages.engines.plan import refuse_secrets  # late, as the others here
    from stages.settings.compose import compose, explain, offer_sheet  # late: pydantic and Hydra take most of the stage
    from stages.settings.editor import json_schema
    from stages.settings.schema import as_yaml, validate
    from stages.settings.untracked import SECTION, divided

    if overrides[:1] == ["--explain"] and len(overrides) > 1:
        print(explain(overrides[1], overrides[2:]))
        return
    if overrides == ["--schema"]:
        print(json_schema(), end="")
        return
    if any(override.startswith("-") for override in overrides):
        from stages.run.commandline import answer  # late: it costs what composing does not need

        if {"--help", "-h"} & {*overrides}:
            print(__doc__)
        if answer(offer_sheet(overrides), "config"):
            return
        usage = "python -m stages.config [--help | --cfg job | --schema | --explain key] [key=value ...]"
        raise Refusal(f"{' '.join(overrides)}: usage: {usage}")
    settings = validate(compose(overrides))
    refuse_secrets(settings.engine.environment, settings.engine.options)
    plain = settings.model_dump(mode="json")  # so that 4 and 4.0 are one setting
    if "DVC_STAGE" not in os.environ:
        print(as_yaml(plain), end="")
        return
    if settings.trainer.fast_dev_run:
        by_hand = "python -m stages.pretrain trainer.fast_dev_run=true"
        raise Refusal(f"trainer.fast_dev_run: DVC would keep its outs: run it by hand, such as {by_hand}")
    if settings.engine.dry_run or settings.engine.node_rank:
        key = "dry_run" if settings.engine.dry_run else "node_rank"
        by_hand = f"python -m stages.pretrain engine.{key}={str(getattr(settings.engine, key)).lower()}"
        raise Refusal(f"engine.{key}: it would leave DVC no outs: run it by hand, such as {by_hand}")
    inputs = inputs_of(settings)
    if settings.teacher.source == "folder":
        refuse_uncuttable(settings.distill.init, teacher_folder(settings.teacher.path, ROOT))
    tracked, untracked = divided(plain)
    write_atomically(ROOT / "resolved.yaml", HEADER + as_yaml(tracked | {SECTION: untracked}))
    write_json(ROOT / INPUTS, inputs)
    remember_accepted(ROOT)
    remember(ROOT, plain)
    remove_recorded(ROOT)


def inputs_of(settings):
    """Fingerprints of what the sections `corpus` and `teacher` name."""
    found = {"corpus": corpus_fingerprint(settings.corpus, ROOT, read_inputs(ROOT))}
    if (teacher := teacher_fingerprint(settings.teacher, ROOT)) is None:
        return found
    refuse_untrimmable(settings.teacher, teacher_folder(settings.teacher.path, ROOT))
    return found | {"teacher": teacher}


if __name__ == "__main__":
    fill_closed_streams()
    try:
        with disk_refusals("config", ROOT), whole_output():
            main(sys.argv[1:])
    except Refusal as refusal:
        undone = undo_set_params(ROOT) if "DVC_EXP_NAME" in os.environ else ""
        sys.exit(f"offramp: {'; '.join(filter(None, [str(refusal), undone]))}")
