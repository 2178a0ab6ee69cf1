"""The inverse of `teacher.trim_vocabulary`: a model folder with the teacher's own vocabulary and tokenizer again.

    whole = WholeVocabulary(data, teacher_folder)
    whole.write(Path("artifacts/student"), Path("out"), sequence_tokens=256)     # refused where its rows do not fit

The rows of tokens that were left out are the teacher's: nobody trained them with the model.
"""

import hashlib
from pathlib import Path

from torch import Tensor

from stages.data.file_tokenizer import FileTokenizer
from stages.data.hub_tokenizer import files_of
from stages.data.shards import TOKENIZER, read_card
from stages.data.vocabulary import read_kept
from stages.files.artifacts import Refusal, read_json, write_atomically
from stages.files.weight_files import weight_files
from stages.model import hub
from stages.model.folders import MODEL_CARD
from stages.model.vocabulary import restored

LIMITS = "## Limits\n\n"  # in a model card


class WholeVocabulary:
    """A teacher, its tokenizer, and which of its tokens a run kept."""

    def __init__(self, data: Path, teacher: Path):
        """`data` is the folder that `prepare` wrote with this teacher's folder; one that was not trimmed is refused."""
        if (found := read_kept(data)) is None:
            raise Refusal("export.vocabulary = whole: artifacts/data has the whole vocabulary: set it to trimmed")
        self.kept, vocab_size = found
        end_of_text = self.kept[read_card(data)["end_of_text"]]
        self.tokenizer = FileTokenizer(teacher / TOKENIZER, vocab_size, end_of_text)
        self.teacher = hub.load(teacher)

    def ids(self, tokens: Tensor) -> Tensor:
        """The teacher's own ids of trimmed ones."""
        return tokens.new_tensor(self.kept)[tokens]

    def write(self, folder: Path, target: Path, sequence_tokens: int) -> None:
        """A complete folder as `folder` is, but for its vocabulary; `sequence_tokens` was trained on."""
        model = restored(hub.load(folder), self.teacher, self.kept, folder.name)
        content, end = self.tokenizer.to_json(), self.tokenizer.end_of_text
        target.mkdir(parents=True)
        hub.save(model, target, end, hashlib.sha256(content.encode()).hexdigest())
        for file, text in files_of(content, self.tokenizer.end_token(), end, sequence_tokens).items():
            write_atomically(target / file, text)
        card = (folder / MODEL_CARD).read_text(encoding="utf-8")
        write_atomically(target / MODEL_CARD, card.replace(LIMITS, self._told(target) + LIMITS))

    def _told(self, target: Path) -> str:
        """The section of the card that says what is other here."""
        whole = self.tokenizer.vocab_size
        lines = [
            "## Whole vocabulary",
            "",
            f"All above is about the model with the {len(self.kept):,} tokens that its text is made of. This folder has"
            f" all {whole:,} of the teacher's, and {weight_files(target).parameters:,} parameters. The rows of the"
            f" {whole - len(self.kept):,} others are the teacher's as they came: this model never learned with them."
            " They take a share of every probability, so its bits per byte here are higher than those above.",
            "",
            f"SHA-256 of the weights in this folder: `{read_json(target / 'config.json')['weights_sha256']}`.",
            "",
        ]
        return "\n".join(lines) + "\n"
