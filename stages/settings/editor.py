"""The JSON schema from which an editor completes and checks params.yaml and the presets: conf/schema.json.

Regenerate it after a change of stages/settings/schema.py or a new preset:
python -m stages.config --schema > conf/schema.json
"""

import json
from pathlib import Path
from typing import Any

from stages.files.artifacts import ROOT
from stages.settings.compose import preset_groups
from stages.settings.schema import Settings
from stages.settings.untracked import OBSERVERS

INTERPOLATION = {"type": "string", "pattern": r"^\$\{.+\}$"}  # such as ${oc.env:NAME}


def json_schema(root: Path = ROOT) -> str:
    """Nothing is required here: params.yaml and the presets each set a part."""
    schema = Settings.model_json_schema()
    for model in [schema, *schema["$defs"].values()]:
        del model["required"], model["title"]
        model["properties"] = {name: _value(inner) for name, inner in model["properties"].items()}
    groups = preset_groups(root)
    for group, presets in groups.items():
        section = schema["properties"].get(group)
        words: dict[str, Any] = {"enum": presets}
        if group in OBSERVERS:
            words = {"anyOf": [words, {"items": words, "type": "array"}]}
        schema["properties"][group] = {"anyOf": [words, section]} if section else words
    corpus = schema["$defs"]["Corpus"]["properties"]
    known = corpus["source"]["anyOf"][0]["enum"]
    corpus["source"] = {"enum": sorted({*groups["corpus"], *known})}  # a preset of one's own, too
    schema["description"] = "Settings of params.yaml and of the presets in conf/."
    return json.dumps(schema, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _value(field: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in field:
        return field
    return {"anyOf": [{key: value for key, value in field.items() if key != "title"}, INTERPOLATION]}
