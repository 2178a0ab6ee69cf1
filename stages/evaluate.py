"""Evaluates every model on the test split and measures what each costs.

    dvc repro evaluate
    python -m stages.evaluate evaluate.test_tokens=20000      # a quick look, into outputs/evaluate/

Quality in bits per byte, top-1 accuracy and calibration with 95% intervals by a paired bootstrap over documents, the
words of the claims (quality kept, gap closed, quality lost), each model against its controls, parameters, operations
per token, activation checkpointing, samples. Nothing here depends on the clock; that is the stage `profile`. Scoring is
in float32 in one process; its progress is saved, and an interrupted evaluation ends with the same bytes.
"""

import io
import json
import math
import os
import time
from pathlib import Path

# before torch: by default threads that wait for each other spin, and on a busy machine evaluate took five times as long
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from tqdm import tqdm

from stages.data.shards import Tokens, load_tokenizer
from stages.files.artifacts import rounded, write_atomically, write_json
from stages.files.resuming import Interruption, ResumeState, resume_key
from stages.measure import flops as cost
from stages.measure import scoring
from stages.measure.subjects import CONTROLS, MODELS, PRODUCTS, deepened, load_models, training_loss
from stages.model import checkpointing
from stages.model.generation import generate
from stages.model.layers import can_compile
from stages.run.entry import Place, run_stage
from stages.run.provenance import cores, device_conditions

SECTIONS = ("evaluate", "sequence_tokens", "seed")
SAMPLE_PROMPT_TOKENS, SAMPLE_NEW_TOKENS, SAMPLE_TEMPERATURE = 32, 96, 0.7  # greedy text of small models loops


def main(settings, place: Place, run) -> dict:
    e, T = settings.evaluate, settings.sequence_tokens
    torch.set_num_threads(cores())
    conditions = device_conditions(int(torch.cuda.is_available())) | {"threads": cores(), "precision": "float32"}
    if torch.cuda.is_available():
        conditions["compiled"] = can_compile()  # the loss, whose memory is counted
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before CUDA starts: one order of summing for what DVC keeps
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    started = time.perf_counter()
    tokens = Tokens(place.read("artifacts/data"), "test")
    loaded = load_models(place.read("artifacts"), tokens.vocab_size)
    tokenizer = load_tokenizer(place.read("artifacts/data"))
    stream = scoring.read_stream(tokens, tokenizer, e.test_tokens)
    n_tokens, n_documents = len(stream.document_of), len(stream.document_bytes)
    print(f"evaluate: {n_tokens:,} of {len(tokens):,} tokens of {n_documents} test documents", flush=True)

    key = state_key(settings, conditions, place)
    with Interruption("evaluate") as interruption, ResumeState(place.root, "evaluate", key) as state:
        windows = math.ceil(n_tokens / T)
        with tqdm(desc="evaluate", unit="window", total=windows, disable=None) as bar:  # None: only on a terminal
            tables = scoring.score(
                loaded, stream, T, e.batch_sequences, "teacher", state, interruption, lambda n, _: bar.update(n - bar.n)
            )
        for name, table in tables.items():
            save_table(place.write(f"artifacts/scores/{name}.npy"), table)
            print(f"evaluate: {name} {scoring.bits_per_byte(table):.4f} bits per byte", flush=True)
        scored = time.perf_counter()

        interruption.at_once("counting")
        if (kept := state.load("counted")) is None:
            texts = samples(loaded, stream, tokenizer, settings.seed)
            kept = json.dumps([count(settings, loaded, stream, tables, len(tokens)), texts]).encode()
            state.save("counted", kept)
        metrics, texts = json.loads(kept)
        write_json(place.write("artifacts/samples.json"), texts)
        write_json(place.write("metrics/evaluate.json"), rounded(headline(metrics)))
        write_json(place.write("artifacts/evaluation.json"), rounded(metrics))
        write_atomically(place.write("plots/quality.csv"), quality_csv(metrics))
        seconds = {"scoring": scored - started, "counting": time.perf_counter() - scored}
        write_json(place.write("measurements/evaluate.json"), {"seconds": rounded(seconds)})
    run.metrics(headline(metrics))
    for name, text in texts.items():
        run.text(f"samples/{name}.txt", text)
    return {"conditions": conditions}


def state_key(settings, conditions: dict, place: Place) -> str:
    read = [settings.evaluate.model_dump(), settings.sequence_tokens, settings.seed, conditions]
    inputs = [place.read(f"artifacts/{name}") for name in MODELS]
    return resume_key("evaluate", read, [*inputs, place.read("artifacts/data/card.json")])


def save_table(path: Path, table: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, table)
    write_atomically(path, buffer.getvalue())


# ---- quality


def count(settings, loaded: dict, stream: scoring.Stream, tables: dict, split_tokens: int) -> dict:
    """All figures but timings; `split_tokens` is the length of the test split."""
    e, T = settings.evaluate, settings.sequence_tokens
    teacher, n_documents = loaded["teacher"], len(stream.document_bytes)
    bootstrap = scoring.Bootstrap(n_documents, e.bootstrap_resamples, settings.seed)
    figures = {
        name: quality(bootstrap, tables[name], name != "teacher") | size(model, T)
        for name, model in loaded.items()
    }
    deep = deepened(teacher, e.checkpoint_layers, settings.seed)
    policies = checkpointing.policies(e.checkpoint_every_blocks, e.checkpoint_layers)
    loss_of = training_loss(deep, stream.tokens, e.checkpoint_batch_sequences, T)
    tokens, n_bytes = int(tables["teacher"][:, scoring.TOKENS].sum()), int(stream.document_bytes.sum())
    return {
        "test": {"documents": n_documents, "tokens": tokens, "bytes": n_bytes, "split_tokens": split_tokens},
        "models": figures,
        "comparisons": comparisons(bootstrap, tables, figures),
        "controls": control_differences(bootstrap, tables),
        "checkpointing": checkpointing.compare_policies(deep, policies, loss_of),
        "checkpointing_layers": e.checkpoint_layers,
    }


def quality(bootstrap: scoring.Bootstrap, table: np.ndarray, beside_teacher: bool) -> dict:
    tokens = table[:, scoring.TOKENS].sum()
    bits = scoring.estimate(scoring.bits_per_byte(table), bootstrap.bits_per_byte(table))
    figures = bits.named("bits_per_byte")
    columns = {"top1_accuracy": scoring.CORRECT}
    if beside_teacher:
        columns |= {"agreement_with_teacher": scoring.AGREEMENT, "kl_to_teacher_nats": scoring.KL}
    for name, column in columns.items():
        resampled = bootstrap.ratio(table, column, scoring.TOKENS)
        figures |= scoring.estimate(table[:, column].sum() / tokens, resampled).named(name)
    return figures | scoring.calibration_error(bootstrap, table).named("calibration_error")


def size(model, sequence_tokens: int) -> dict:
    return {
        "parameters": cost.total_parameters(model),
        "active_parameters": cost.active_parameters(model),
        "flops_per_token": cost.flops_per_token(model.shape, sequence_tokens)["total"],
        "counted_flops_per_token": cost.counted_flops_per_token(model, sequence_tokens),
    }


def comparisons(bootstrap: scoring.Bootstrap, tables: dict, figures: dict) -> dict:
    """The claims in our words; each stands beside its control."""
    teacher, student, control = tables["teacher"], tables["student"], tables["control"]
    closed, reason = scoring.gap_closed(bootstrap, teacher, student, control)
    gap, gap_error = scoring.difference(bootstrap, control, teacher)
    gain, gain_error = scoring.difference(bootstrap, control, student)
    found = {
        "student": {
            **scoring.quality_kept(bootstrap, teacher, student).named("quality_kept"),
            **scoring.quality_kept(bootstrap, teacher, control).named("control_quality_kept"),
            **closed.named("gap_closed"),
            "gap_closed_reason": reason or None,
            "parameters_share": figures["student"]["parameters"] / figures["teacher"]["parameters"],
        },
        "teacher_over_control": {**gap.named("difference"), "standard_error": gap_error},
        "student_over_control": {**gain.named("difference"), "standard_error": gain_error},
    }
    for name in ("teacher", "student"):
        dense, sparse, continued = tables[name], tables[f"sparse_{name}"], tables[f"continued_{name}"]
        found[f"sparse_{name}"] = {
            **scoring.quality_lost(bootstrap, dense, sparse).named("quality_lost"),
            **scoring.quality_lost(bootstrap, dense, continued).named("continued_quality_lost"),
            **scoring.quality_lost(bootstrap, continued, sparse).named("quality_lost_to_continued"),
            "flops_cut": 1 - figures[f"sparse_{name}"]["flops_per_token"] / figures[name]["flops_per_token"],
        }
    return found


def control_differences(bootstrap: scoring.Bootstrap, tables: dict) -> dict:
    """Bits per byte of each control minus those of the model held against it: above zero the model is better."""
    found: dict[str, dict] = {}
    for name, controls in CONTROLS.items():
        for control in controls:
            difference, error = scoring.difference(bootstrap, tables[control], tables[name])
            found.setdefault(name, {})[control] = difference.named("difference") | {"standard_error": error}
    return found


def quality_csv(metrics: dict) -> str:
    lines = ["model,flops_per_token,bits_per_byte,low,high,documents"]
    documents = str(metrics["test"]["documents"])  # behind each interval
    for name, model in metrics["models"].items():
        numbers = [model[key] for key in ("bits_per_byte", "bits_per_byte_low", "bits_per_byte_high")]
        shown = ["" if number is None else f"{number:.6g}" for number in numbers]
        lines.append(",".join([name, f"{model['flops_per_token']:.0f}", *shown, documents]))
    return "\n".join(lines) + "\n"


def samples(loaded: dict, stream: scoring.Stream, tokenizer, seed: int) -> dict[str, str]:
    """One prompt, the opening of the first test document that is longer, continued by each model but the controls."""
    lengths = np.bincount(stream.document_of)[: len(stream.document_bytes)]
    document = int(np.argmax(lengths > SAMPLE_PROMPT_TOKENS))
    start = 1 + int(np.argmax(stream.document_of == document))
    prompt = stream.tokens[start : start + min(SAMPLE_PROMPT_TOKENS, max(1, int(lengths[document]) - 1))]
    prompt, end, texts = prompt.tolist(), tokenizer.end_of_text, {}
    for name in PRODUCTS:
        model = loaded[name]
        ids = generate(model, prompt, SAMPLE_NEW_TOKENS, True, SAMPLE_TEMPERATURE, seed, end)
        texts[name] = tokenizer.decode(prompt + ids)
    return texts


def headline(metrics: dict) -> dict[str, float]:
    """What a person compares runs by; all figures are in artifacts/evaluation.json."""
    values = {f"{name}_bits_per_byte": model["bits_per_byte"] for name, model in metrics["models"].items()}
    values["test_documents"] = metrics["test"]["documents"]
    compared = metrics["comparisons"]
    values["quality_kept"] = compared["student"]["quality_kept"]
    values["gap_closed"] = compared["student"]["gap_closed"]
    for name in ("teacher", "student"):
        values[f"sparse_{name}_quality_lost"] = compared[f"sparse_{name}"]["quality_lost"]
        values[f"sparse_{name}_flops_cut"] = compared[f"sparse_{name}"]["flops_cut"]
    return {name: value for name, value in values.items() if value is not None}


if __name__ == "__main__":
    run_stage(main, "evaluate", SECTIONS)
