"""How good a model is on the test split: bits per byte and accuracy by document, intervals, quality words.

The unit of statistics is the document: its losses are summed over its tokens, and every interval comes from
one paired bootstrap over documents (the same resamples for every model): what two models share cancels.

Shapes: M models, B windows, T tokens of a window, C tokens of a chunk, V vocabulary, G documents, S columns
of scores, R bootstrap resamples.
"""

import io
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stages.files.artifacts import Refusal
from stages.files.resuming import Interruption, ResumeState

# Columns of a score table, sums over the tokens of a document; the last two are against the reference.
COLUMNS = ("nats", "bytes", "tokens", "correct", "agreement", "kl_nats")
NATS, BYTES, TOKENS, CORRECT, AGREEMENT, KL = range(len(COLUMNS))
CHUNK_TOKENS = 1024  # logits [1024, V] at a time
SUMS, SAVE_SECONDS = "sums", 2.0  # of unfinished work


Models = dict[str, nn.Module]


class Stream(NamedTuple):
    """The beginnings of all test documents one after another, and the document and byte count of what is scored."""

    tokens: np.ndarray  # int64 [N + 1], led by one end-of-text token so that every token has a context
    document_of: np.ndarray  # int64 [N]; G for the end-of-text after a document that was cut: context, not scored
    document_bytes: np.ndarray  # int64 [G], of the tokens scored


def even_shares(token_counts: np.ndarray, budget_tokens: int) -> np.ndarray:
    """How many tokens of each document are scored: all of a short one, and of the longer ones equally many, int64 [G].

    The sum is at most the budget, but each document has at least one token.
    """
    shortest_first = np.sort(token_counts)
    left = budget_tokens
    for number, count in enumerate(shortest_first):
        most = left // (len(shortest_first) - number)  # for each of those not yet served
        if count > most:
            return np.minimum(token_counts, max(1, most))
        left -= count
    return token_counts.copy()


def read_stream(tokens, tokenizer, budget_tokens: int) -> Stream:
    """The test stream from a `shards.Tokens`: every document, the long ones cut to an even share of the budget.

    An end-of-text follows a document that was cut, as it does every document in training.
    """
    documents = np.asarray(tokens.documents)
    if len(documents) == 0:
        raise Refusal("artifacts/data: the test split has no document; raise prepare.test_share")
    shares = even_shares(documents[:, 1], budget_tokens)
    ending = np.array([tokenizer.end_of_text])
    parts, document_of, document_bytes = [ending], [], documents[:, 2].copy()
    for row, ((start, count, _), share) in enumerate(zip(documents, shares, strict=True)):
        parts.append(tokens.window(int(start), int(share)))
        document_of.append(np.full(share, row))
        if share < count:
            document_bytes[row] = len(tokenizer.bytes_of(parts[-1].tolist()))
            parts.append(ending)
            document_of.append(np.array([len(documents)]))
    return Stream(
        tokens=np.concatenate(parts).astype(np.int64),
        document_of=np.concatenate(document_of).astype(np.int64),
        document_bytes=document_bytes.astype(np.int64),
    )


@torch.no_grad()
def window_scores(models: Models, tokens_BT1: Tensor, reference: str) -> np.ndarray:
    """Nats, correctness, agreement with and KL from the reference of each predicted token: [M, B*T, 4].

    The heads are applied to a chunk of tokens at a time: a batch's logits would be its largest tensor. The
    reference's logits are computed once for all models.
    """
    inputs_BT, targets_N = tokens_BT1[:, :-1], tokens_BT1[:, 1:].flatten()
    features = {name: model.features(inputs_BT).x_BTD.flatten(0, 1) for name, model in models.items()}
    chunks = []
    for start in range(0, len(targets_N), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        log_q_CV = models[reference].head(features[reference][chunk]).float().log_softmax(-1)
        q_CV, reference_best_C = log_q_CV.exp(), log_q_CV.argmax(-1)
        rows = []
        for name, model in models.items():
            own = name == reference
            log_p_CV = log_q_CV if own else model.head(features[name][chunk]).float().log_softmax(-1)
            best_C = log_p_CV.argmax(-1)
            nats_C = -log_p_CV.gather(1, targets_N[chunk, None]).squeeze(1)
            kl_C = torch.zeros_like(nats_C) if own else (q_CV * (log_q_CV - log_p_CV)).sum(-1)
            columns = [nats_C, best_C == targets_N[chunk], best_C == reference_best_C, kl_C]
            rows.append(torch.stack([column.double() for column in columns], dim=1))
        chunks.append(torch.stack(rows))
    return torch.cat(chunks, dim=1).cpu().numpy()


def score(
    models: Models,
    stream: Stream,
    sequence_tokens: int,
    batch_sequences: int,
    reference: str,
    state: ResumeState | None = None,
    interruption: Interruption | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """The score table [G, columns] of every model over fixed, non-overlapping windows of the stream.

    `state` receives the sums so far, every SAVE_SECONDS and when an interruption is requested; the next call
    continues from them and ends with the same bits, because the batches and the order of their sums do not
    depend on where it stopped.
    """
    n_tokens, n_documents = len(stream.document_of), len(stream.document_bytes)
    n_windows = math.ceil(n_tokens / sequence_tokens)
    first, tables_MGS = _continued(state, (len(models), n_documents, len(COLUMNS)))
    if first:
        print(f"evaluate: continuing after window {first:,} of {n_windows:,}", flush=True)
    saved = time.monotonic()
    device = next(models[reference].parameters()).device
    for window in range(first, n_windows, batch_sequences):
        start = window * sequence_tokens
        stop = min(start + batch_sequences * sequence_tokens, n_tokens)
        whole = start + (stop - start) // sequence_tokens * sequence_tokens
        pieces = [(start, whole, sequence_tokens), (whole, stop, stop - whole)]  # the last window is shorter
        for low, high, length in pieces:
            if high > low:
                windows = [stream.tokens[at : at + length + 1] for at in range(low, high, length)]
                scores = window_scores(models, torch.from_numpy(np.stack(windows)).to(device), reference)
                _add_by_document(tables_MGS, stream.document_of[low:high], scores)
        done = min(window + batch_sequences, n_windows)
        stopping = interruption is not None and interruption.requested  # asked once, so that no stop goes unsaved
        if state is not None and (stopping or done == n_windows or time.monotonic() - saved >= SAVE_SECONDS):
            buffer = io.BytesIO()
            np.save(buffer, np.append(tables_MGS.ravel(), done))
            state.save(SUMS, buffer.getvalue())
            saved = time.monotonic()
        on_batch(done, n_windows)
        if interruption is not None and stopping:
            interruption.check(f"scoring, after window {done:,} of {n_windows:,}")
    tables = dict(zip(models, tables_MGS, strict=True))
    for name, table in tables.items():
        table[:, BYTES] = stream.document_bytes
        table[:, TOKENS] = np.bincount(stream.document_of, minlength=n_documents)[:n_documents]
        if not np.isfinite(table).all():
            raise Refusal(
                f"artifacts/{name} has a loss that is not finite on the test split: train this model again"
            )
    return tables


def _continued(state: ResumeState | None, shape: tuple[int, int, int]) -> tuple[int, np.ndarray]:
    """The next window and the sums so far; from the start where nothing usable was saved."""
    fresh = 0, np.zeros(shape)
    if state is None or (kept := state.load(SUMS)) is None:
        return fresh
    try:
        saved = np.lib.format.read_array(io.BytesIO(kept), allow_pickle=False)
        return int(saved[-1]), saved[:-1].reshape(shape)
    except (ValueError, MemoryError):  # not these numbers, or more than there are
        state.say_damaged(SUMS)
        return fresh


def _add_by_document(tables_MGS: np.ndarray, document_of: np.ndarray, scores: np.ndarray) -> None:
    for table, columns in zip(tables_MGS, scores, strict=True):
        for column, values in zip((NATS, CORRECT, AGREEMENT, KL), columns.T, strict=True):
            table[:, column] += np.bincount(document_of, weights=values, minlength=len(table))[: len(table)]


# ---- from tables to figures with intervals


def bits_per_byte(table: np.ndarray) -> float:
    return table[:, NATS].sum() / math.log(2) / table[:, BYTES].sum()


class Bootstrap:
    """Paired resampling of documents: how often each document stands in each resample, [R, G]."""

    def __init__(self, n_documents: int, resamples: int, seed: int):
        generator = np.random.Generator(np.random.PCG64(seed))
        drawn_RG = generator.integers(0, n_documents, size=(resamples, n_documents))
        self.counts_RG = np.stack([np.bincount(row, minlength=n_documents) for row in drawn_RG]).astype(float)

    def bits_per_byte(self, table: np.ndarray) -> np.ndarray:
        return self.ratio(table, NATS, BYTES) / math.log(2)

    def ratio(self, table: np.ndarray, above: int, below: int) -> np.ndarray:
        if len(table) < 2:  # resamples of one document are alike: no interval, rather than one of no width
            return np.full(len(self.counts_RG), np.nan)
        return (self.counts_RG @ table[:, above]) / (self.counts_RG @ table[:, below])


class Estimate(NamedTuple):
    """A figure and the ends of its 95% interval; None where the figure has no meaning."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def named(self, name: str) -> dict[str, float | None]:
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def estimate(value: float, resampled_R: np.ndarray) -> Estimate:
    """With the central 95% of the resampled values; without an interval where they are NaN (one document)."""
    if np.isnan(resampled_R).any():
        return Estimate(float(value))
    low, high = np.quantile(resampled_R, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def quality_kept(bootstrap: Bootstrap, teacher: np.ndarray, student: np.ndarray) -> Estimate:
    """Teacher bits per byte over student bits per byte."""
    return estimate(
        bits_per_byte(teacher) / bits_per_byte(student),
        bootstrap.bits_per_byte(teacher) / bootstrap.bits_per_byte(student),
    )


def quality_lost(bootstrap: Bootstrap, dense: np.ndarray, sparse: np.ndarray) -> Estimate:
    """Sparse bits per byte over dense bits per byte, minus one."""
    return estimate(
        bits_per_byte(sparse) / bits_per_byte(dense) - 1,
        bootstrap.bits_per_byte(sparse) / bootstrap.bits_per_byte(dense) - 1,
    )


def difference(bootstrap: Bootstrap, worse: np.ndarray, better: np.ndarray) -> tuple[Estimate, float | None]:
    """Paired difference in bits per byte, and its standard error (None with one document)."""
    resampled_R = bootstrap.bits_per_byte(worse) - bootstrap.bits_per_byte(better)
    value = bits_per_byte(worse) - bits_per_byte(better)
    error = float(resampled_R.std(ddof=1))
    return estimate(value, resampled_R), None if math.isnan(error) else error


def gap_closed(
    bootstrap: Bootstrap, teacher: np.ndarray, student: np.ndarray, control: np.ndarray
) -> tuple[Estimate, str]:
    """(control - student) / (control - teacher), or why that has no meaning: a gap inside its own noise."""
    _, error = difference(bootstrap, control, teacher)
    gap = bits_per_byte(control) - bits_per_byte(teacher)
    if error is None:
        return Estimate(None), "one test document gives no standard error"
    if gap <= 2 * error:
        return Estimate(None), (
            f"control - teacher = {gap:.4f} bits per byte is not more than two standard errors"
            f" ({error:.4f} each)"
        )
    teacher_R, student_R, control_R = map(bootstrap.bits_per_byte, (teacher, student, control))
    closed = (bits_per_byte(control) - bits_per_byte(student)) / gap
    return estimate(closed, (control_R - student_R) / (control_R - teacher_R)), ""
