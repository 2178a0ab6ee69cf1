"""Writes models in the forms that other programs read, and measures what each form costs: a command, no stage.

    python -m stages.export                                          # into outputs/export/<time>/
    python -m stages.export export.formats=[gguf] export.models=[student] hydra.run.dir=exports/mine

hf is the Hugging Face folder with the test figures in its card, gguf is for llama.cpp, onnx is a graph that scores,
onnx_genai one that ONNX Runtime GenAI writes with, int8 is for transformers with torchao; gguf, onnx_genai and int8 are
of dense models. All but hf need extras. Each form's size, bits per byte, greedy continuations and speed stand beside
the model's own, measured in the same run. Where the vocabulary was trimmed, export.vocabulary=whole brings back the
teacher's (stages/formats/whole_vocabulary.py).
"""

import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from operator import eq
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from stages.data.fingerprints import teacher_fingerprint
from stages.data.hub_tokenizer import GENERATION_CONFIG, TOKENIZER_CONFIG
from stages.data.shards import TOKENIZER, Tokens, Windows, read_card
from stages.data.teacher_folder import teacher_folder
from stages.files.artifacts import Refusal, read_json, rounded, write_json
from stages.files.extras import extra
from stages.formats.hugging_face import write_hugging_face
from stages.formats.whole_vocabulary import WholeVocabulary
from stages.model import hub
from stages.model.folders import MODEL_CARD, folder_of
from stages.model.generation import generate
from stages.run.entry import Place, run_stage
from stages.run.provenance import cores
from stages.settings.models import TEACHER_FOLDER

SECTIONS = ("export", "sequence_tokens", *TEACHER_FOLDER)
PROMPT_TOKENS = 32
BATCH_SEQUENCES = 8
EXTRAS = {
    "gguf": ("gguf", "gguf", "xllamacpp"),
    "onnx": ("onnx", "onnx", "onnxscript", "onnxruntime", "transformers"),
    "onnx_genai": ("genai", "onnxruntime_genai", "onnx_ir", "transformers"),
    "int8": ("int8", "torchao", "transformers"),
}

COMPANIONS = (TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, MODEL_CARD)

Logits = Callable[[Tensor], Tensor]  # token ids [B, T] to logits [B, T, V]


@dataclass(frozen=True)
class Yardstick:
    """What every form is measured by."""

    windows_WT1: Tensor  # of the test split
    bytes_per_token: float
    prompts: list[list[int]]
    new_tokens: int  # after each prompt
    end_of_text: int
    tokenizer_sha256: str


@dataclass(frozen=True)
class Written:
    """Greedy continuations of the prompts."""

    texts: list[list[int]]
    tokens_per_second: float


@dataclass(frozen=True)
class Form:
    """One file or folder, as measured; None where its runtime does not do that."""

    bytes: int
    bits_per_byte: float
    largest_logit_difference: float  # from the model
    equal_continuations: int | None  # of the prompts
    score_tokens_per_second: float | None
    score_speedup: float | None  # over the model in this project's own code
    write_tokens_per_second: float | None
    write_speedup: float | None


def main(settings, place: Place, run) -> dict:
    e = settings.export
    for word in e.formats:
        if word in EXTRAS:
            extra(*EXTRAS[word])  # refused before the first file is written
    folders = [folder_of(word, place.root).resolve() for word in e.models]
    if twice := [name for name, count in Counter(folder.name for folder in folders).items() if count > 1]:
        raise Refusal(f"export.models names two models {twice[0]}, which would be written into one folder: name one")
    torch.set_num_threads(cores())
    yardstick = read_yardstick(place, settings.sequence_tokens, e)
    evaluation = place.read("artifacts/evaluation.json")
    known = read_json(evaluation) if evaluation.exists() else None
    whole = whole_vocabulary(settings.teacher, place) if e.vocabulary == "whole" else None
    found: dict[str, dict[str, Form]] = {}
    for folder in folders:
        refuse_unfit(folder, yardstick.tokenizer_sha256)
        found[folder.name], out = {}, place.write(f"export/{folder.name}")
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            source, measured_by = folder, yardstick
            if whole is not None:
                source, measured_by = Path(scratch) / folder.name, in_whole_ids(yardstick, whole)
                if not can_have(set(), whole.write, folder, source, settings.sequence_tokens):
                    continue
            for form, measured in forms(source, out, e, measured_by, known):
                print(f"export: {folder.name} as {form}: {measured.bytes:,} bytes", flush=True)
                found[folder.name][form] = measured
    print(table(found, len(yardstick.prompts)))
    report(found, place, run)
    return {}


def refuse_unfit(folder: Path, tokenizer_sha256: str) -> None:
    """A folder that is not complete, or a model of another tokenizer than the test split's."""
    config = read_json(folder / "config.json")
    if config.get("tokenizer_sha256") != tokenizer_sha256:
        raise Refusal(f"{folder} was trained with another tokenizer than artifacts/data has: export both of one run")
    if missing := [name for name in COMPANIONS if not (folder / name).is_file()]:
        raise Refusal(f"{folder / missing[0]} is missing: run the stage that writes the model (dvc repro)")


def read_yardstick(place: Place, sequence_tokens: int, e: Any) -> Yardstick:
    tokens = Tokens(place.read("artifacts/data"), "test")
    windows_WT1 = Windows(tokens, sequence_tokens, seed=None).spread(max(e.test_sequences, e.prompts))
    prompts = [row[: min(PROMPT_TOKENS, sequence_tokens)].tolist() for row in windows_WT1[: e.prompts]]
    tokenizer_sha256 = read_card(place.read("artifacts/data"))["tokenizer_sha256"]
    return Yardstick(windows_WT1, tokens.bytes_per_token, prompts, e.new_tokens, tokens.end_of_text, tokenizer_sha256)


def whole_vocabulary(teacher: Any, place: Place) -> WholeVocabulary:
    """`teacher` is the section of that name, whose folder must be the one that the data was made with."""
    data = place.read("artifacts/data")
    files = teacher_fingerprint(teacher, place.root)
    if files is None or files != read_card(data).get("teacher"):
        raise Refusal(
            "export.vocabulary = whole: it needs the teacher's folder as artifacts/data was made with it"
            f" (teacher.source = {teacher.source}, teacher.path = {teacher.path})"
        )
    return WholeVocabulary(data, teacher_folder(teacher.path, place.root))


def in_whole_ids(yardstick: Yardstick, whole: WholeVocabulary) -> Yardstick:
    return replace(
        yardstick,
        windows_WT1=whole.ids(yardstick.windows_WT1),
        prompts=[[whole.kept[id] for id in prompt] for prompt in yardstick.prompts],
        end_of_text=whole.kept[yardstick.end_of_text],
    )


def forms(folder: Path, out: Path, e: Any, yardstick: Yardstick, known: dict | None) -> Iterator[tuple[str, Form]]:
    """Each form, written and measured; one that this model cannot have is named and left out."""
    model, name, told = hub.load(folder), folder.name, set[str]()
    own = written_by(model, yardstick)
    out.mkdir(parents=True, exist_ok=True)
    if "hf" in e.formats:
        write_hugging_face(folder, out / "hf", name, known)
        copy = hub.load(out / "hf")
        yield "hf", measure(out / "hf", copy, model, yardstick, own, written_by(copy, yardstick))
    if "gguf" in e.formats:
        from stages.formats.gguf_file import load_gguf, write_gguf

        for kind in e.gguf_kinds:
            path = out / f"{name}-{kind}.gguf"
            if can_have(told, write_gguf, folder, path, kind):
                written = written_by_llama_cpp(path, yardstick)
                yield f"gguf {kind}", measure(path, load_gguf(folder, path), model, yardstick, own, written, False)
    if "onnx" in e.formats:
        from stages.formats.onnx_graph import OnnxModel, write_onnx

        path = out / f"{name}.onnx"
        if can_have(told, write_onnx, folder, path):
            yield "onnx", measure(path, OnnxModel(path, cores()).logits, model, yardstick, own, None)
    if "onnx_genai" in e.formats:
        from stages.formats.onnx_genai import GenAiModel, write_onnx_genai

        if can_have(told, write_onnx_genai, folder, out / "onnx_genai"):
            graph = GenAiModel(out / "onnx_genai")
            written = written_by_greedy(graph, yardstick)
            yield "onnx_genai", measure(out / "onnx_genai", graph.logits, model, yardstick, own, written)
    if "int8" in e.formats:
        from stages.formats.int8_folder import Int8Model, write_int8

        if can_have(told, write_int8, folder, out / "int8"):
            small = Int8Model(out / "int8")
            written = written_by_greedy(small, yardstick)
            yield "int8", measure(out / "int8", small.logits, model, yardstick, own, written)


def can_have(told: set[str], write: Callable, *what: Any) -> bool:
    """Writes a form; where the model has none of that kind, says why, but not what it has `told` of another kind."""
    try:
        write(*what)
    except Refusal as refusal:
        if str(refusal) not in told:
            print(f"export: left out: {refusal}", flush=True)
        told.add(str(refusal))
        return False
    return True


# ---- measuring


@torch.no_grad()
def measure(
    path: Path,
    logits_of: Logits,
    model: Logits,
    yardstick: Yardstick,
    own: Written,
    written: Written | None,
    by_its_runtime: bool = True,
) -> Form:
    """`logits_of` is the form, `model` the original; both score the same windows, taking turns.

    Where the form's own runtime gives no logits (`by_its_runtime` False), its weights are scored, and nothing is timed.
    """
    nats, difference, seconds = 0.0, 0.0, {"own": 0.0, "form": 0.0}
    for batch_BT1 in yardstick.windows_WT1.split(BATCH_SEQUENCES):
        inputs_BT, targets_BT = batch_BT1[:, :-1].contiguous(), batch_BT1[:, 1:]
        scored = {}
        for name, compute in (("own", model), ("form", logits_of)):
            started = time.perf_counter()
            scored[name] = compute(inputs_BT)
            seconds[name] += time.perf_counter() - started
        difference = max(difference, (scored["own"] - scored["form"]).abs().max().item())
        share_BTV = scored["form"].double().log_softmax(-1)
        nats -= share_BTV.gather(-1, targets_BT[..., None]).sum().item()
    tokens = yardstick.windows_WT1[:, 1:].numel()
    return Form(
        bytes=sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir())),
        bits_per_byte=nats / math.log(2) / (tokens * yardstick.bytes_per_token),
        largest_logit_difference=difference,
        equal_continuations=sum(map(eq, written.texts, own.texts)) if written else None,
        score_tokens_per_second=tokens / seconds["form"] if by_its_runtime else None,
        score_speedup=seconds["own"] / seconds["form"] if by_its_runtime else None,
        write_tokens_per_second=written.tokens_per_second if written else None,
        write_speedup=written.tokens_per_second / own.tokens_per_second if written else None,
    )


def written_by(model: Any, yardstick: Yardstick) -> Written:
    """Greedy continuations, timed without their prompts, which the first token waits for."""
    texts, seconds, tokens = [], 0.0, 0
    for prompt in yardstick.prompts:
        times: list[float] = []
        ids = generate(model, prompt, yardstick.new_tokens, before_each=partial(note_time, times))
        seconds, tokens = seconds + times[-1] - times[1], tokens + len(ids) - 2
        end = yardstick.end_of_text
        texts.append(ids[: ids.index(end)] if end in ids else ids)
    return Written(texts, tokens / seconds)


def note_time(times: list[float]) -> None:
    times.append(time.perf_counter())


def written_by_llama_cpp(path: Path, yardstick: Yardstick) -> Written:
    """On one thread, as `generate` writes small models on CPU."""
    from stages.formats.llama_cpp import LlamaCpp

    length = max(map(len, yardstick.prompts)) + yardstick.new_tokens
    with LlamaCpp(path, 1, length) as server:
        answers = [server.greedy(prompt, yardstick.new_tokens) for prompt in yardstick.prompts]
    return Written([ids for ids, _ in answers], statistics.median(speed for _, speed in answers))


def written_by_greedy(model: Any, yardstick: Yardstick) -> Written:
    """By a model whose method `greedy` gives a continuation, and its seconds after the second token."""
    answers = [model.greedy(prompt, yardstick.new_tokens) for prompt in yardstick.prompts]
    end = yardstick.end_of_text
    texts = [ids[: ids.index(end)] if end in ids else ids for ids, _ in answers]
    tokens = sum(max(len(ids) - 2, 0) for ids, _ in answers)
    return Written(texts, tokens / max(sum(seconds for _, seconds in answers), 1e-9))  # one may end at once


# ---- telling


def report(found: dict[str, dict[str, Form]], place: Place, run) -> None:
    """What equal runs share into metrics/, what depends on the clock into measurements/."""
    timed = ("score_tokens_per_second", "score_speedup", "write_tokens_per_second", "write_speedup")
    plain = {name: {form: vars(row) for form, row in rows.items()} for name, rows in found.items()}
    for folder, wanted in (("metrics", False), ("measurements", True)):
        kept = {
            name: {form: {key: row[key] for key in row if (key in timed) is wanted} for form, row in rows.items()}
            for name, rows in plain.items()
        }
        write_json(place.write(f"{folder}/export.json"), rounded(kept))
    run.metrics({f"{name}.{form}.bytes": row.bytes for name, rows in found.items() for form, row in rows.items()})


def table(found: dict[str, dict[str, Form]], prompts: int) -> str:
    """A line per form; a speed stands beside how many times this project's own code it is, in the same run."""
    head = ["model", "form", "bytes", "bits/byte", "logits off by", "same texts", "scores tokens/s", "writes tokens/s"]
    rows = []
    for name, forms_of in found.items():
        for form, row in forms_of.items():
            quality = [f"{row.bytes:,}", f"{row.bits_per_byte:.5f}", f"{row.largest_logit_difference:.1e}"]
            same = "-" if row.equal_continuations is None else f"{row.equal_continuations} of {prompts}"
            scores = speed(row.score_tokens_per_second, row.score_speedup)
            writes = speed(row.write_tokens_per_second, row.write_speedup)
            rows.append([name, form, *quality, same, scores, writes])
    return tabulate(rows, headers=head, disable_numparse=True)


def speed(tokens_per_second: float | None, speedup: float | None) -> str:
    return "-" if tokens_per_second is None else f"{tokens_per_second:,.0f} ({speedup:.1f}x)"


if __name__ == "__main__":
    run_stage(main, "export", SECTIONS)
