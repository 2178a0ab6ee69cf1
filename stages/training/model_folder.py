"""What stands beside the weights in a model folder: the tokenizer, the generation settings and a model card.

With them AutoTokenizer, pipeline("text-generation") and `hf upload` take the folder as it is. The card names what the
model was made from by checksums. Equal runs must write equal bytes, so it has no commit, date, host or path.
"""

from collections.abc import Mapping
from pathlib import Path

from stages.data.hub_tokenizer import TOKENIZER_CONFIG, tokenizer_files
from stages.data.shards import read_card
from stages.files.artifacts import read_json, write_atomically
from stages.files.weight_files import weight_files
from stages.model.folders import FIGURES_LATER, MODEL_CARD
from stages.run.entry import Place
from stages.settings.model_types import SOFTMAX_TYPE

STRUCTURE = {  # what a reader looks for first in config.json, where the family has it
    "vocab_size": "vocabulary",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key/value heads",
    "intermediate_size": "MLP width",
    "n_routed_experts": "routed experts",  # DeepSeek, GLM
    "num_local_experts": "routed experts",  # Mixtral, GraniteMoE, GPT-OSS
    "num_experts": "routed experts",  # Qwen, OLMoE
    "num_experts_per_tok": "experts per token",
    "moe_intermediate_size": "expert width",
    "max_position_embeddings": "context in training, tokens",
}
CONTEXT = STRUCTURE["max_position_embeddings"]
NO_SOURCES: Mapping[str, str] = {}
LICENCES = {
    "stdlib": "The text is Python's standard library: PSF-2.0, and the licences that some of its files name.",
    "files": "The text comes from the user's own files, whose licences are not known here.",
    "huggingface": "The text is a dataset whose own card states its licence.",
}
OF_A_FOLDER = "Its teacher was read from a folder: what that one's licence asks for holds for this model too."


def complete_folder(
    place: Place,
    name: str,
    summary: str,
    parents: tuple[str, ...],
    figures: Mapping[str, float],
    sequence_tokens: int,
    sources: Mapping[str, str] = NO_SOURCES,
) -> None:
    """Writes the companions of artifacts/<name>, whose config.json and weights are there.

    `summary` says in a sentence how the model was made, `parents` which models of artifacts/ it was made from,
    `sources` the SHA-256 of what else it was made from, and `figures` what was measured of it so far.
    """
    folder, data = place.write(f"artifacts/{name}"), place.read("artifacts/data")
    for file, content in tokenizer_files(data, sequence_tokens).items():
        write_atomically(folder / file, content)
    hashes = {parent: read_json(place.read(f"artifacts/{parent}") / "config.json") for parent in parents}
    lineage = {f"weights of `{parent}`": config["weights_sha256"] for parent, config in hashes.items()} | dict(sources)
    card = model_card(folder, name, summary, lineage, figures, read_card(data), sequence_tokens)
    write_atomically(folder / MODEL_CARD, card)


def model_card(
    folder: Path,
    name: str,
    summary: str,
    lineage: Mapping[str, str],
    figures: Mapping[str, float],
    data: dict,
    sequence_tokens: int,
) -> str:
    """README.md of a model folder; `lineage` has the SHA-256 of what it was made from, `data` is the data's card,
    `sequence_tokens` the length of the texts that it was trained on here."""
    config, corpus = read_json(folder / "config.json"), data["corpus"]
    hashes = {"data card (tokenizer, token shards)": data["sha256"], "tokenizer": data["tokenizer_sha256"], **lineage}
    hashes["weights of this model"] = config["weights_sha256"]
    end_of_text = read_json(folder / TOKENIZER_CONFIG)["eos_token"]
    structure = {"parameters": weight_files(folder).parameters}
    structure |= {word: config[key] for key, word in STRUCTURE.items() if key in config}
    from_folder = bool(lineage and "teacher" in data)  # it, or what it was made from
    if not from_folder:  # as long as its texts here were, though its shape may be one of a folder's
        structure[CONTEXT] = min(sequence_tokens, structure[CONTEXT])
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [offramp]",
        "---",
        "",
        f"# {name}",
        "",
        f"{summary} Offramp's pipeline wrote it, and measures it.",
        "",
        *_table("structure", structure),
        *_table("known when this was written", {key.replace("_", " "): value for key, value in figures.items()}),
        FIGURES_LATER,
        "",
        "## Lineage",
        "",
        f"Text: {corpus['name']} (`corpus.source: {corpus['source']}`), "
        f"{data['splits']['train']['tokens']:,} training tokens.",
        "",
        *_table("SHA-256 of", {key: f"`{value}`" for key, value in hashes.items()}),
        "## Limits",
        "",
        "- A base model: it continues text. It has no chat template, follows no instructions and was not made safe.",
        *_reading(structure[CONTEXT], from_folder),
        f"- `{end_of_text}` ends a text. A prompt that spells it is read as text, as `split_special_tokens` says.",
        *_vocabulary(data),
        *_loading(config),
        "",
        "## Licences",
        "",
        LICENCES[corpus["source"]],
        *([OF_A_FOLDER] if from_folder else []),
        "Offramp's code is Apache-2.0. This card states no licence of the weights: who publishes them decides, and",
        "writes it into the metadata above.",
        "",
    ]
    return "\n".join(lines)


def _table(title: str, rows: Mapping[str, object]) -> list[str]:
    def shown(value: object) -> str:
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)

    return [f"| {title} | |", "| --- | ---: |", *(f"| {key} | {shown(value)} |" for key, value in rows.items()), ""]


def _reading(tokens: int, from_folder: bool) -> list[str]:
    if from_folder:
        return ["- It comes from a model whose training texts are not known here: the test text may have been among",
                "  them."]  # fmt: skip
    return [f"- It has read one corpus, at most {tokens} tokens at a time. Longer texts and",
            "  other kinds of text are beyond it."]  # fmt: skip


def _vocabulary(data: dict) -> list[str]:
    if "trimmed" in data:
        whole = data["trimmed"]["vocab_size"]
        return [f"- Its vocabulary is {data['vocab_size']:,} of the teacher's {whole:,} tokens: those that its text is",
                "  made of. Other text falls into smaller pieces. Tokens that are not there take no probability, so",
                "  its bits per byte compare with those of models of the same vocabulary only."]  # fmt: skip
    return []


def _loading(config: dict) -> list[str]:
    if config["model_type"] == SOFTMAX_TYPE:
        return ["- Its router takes a softmax. transformers has no such class: only Offramp's own code reads it."]
    return []


