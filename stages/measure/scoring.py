"""How good a model is on the test split: bits per byte, accuracy and calibration by document, intervals, quality words.

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

# Columns of a score table, sums over the tokens of a document; agreement and KL are against the reference. A gap is the
# probability of the first choice minus whether it was right, summed over the tokens of one bin of that probability.
BINS = 15
COLUMNS = ("nats", "bytes", "tokens", "correct", "agreement", "kl_nats", *(f"gap_{bin + 1}" for bin in range(BINS)))
NATS, BYTES, TOKENS, CORRECT, AGREEMENT, KL, FIRST_GAP, *_ = range(len(COLUMNS))
CHUNK_TOKENS = 1024  # logits [1024, V] at a time
SUMS, CONFIDENCES, SAVE_SECONDS = "sums", "confidences", 2.0  # of unfinished work


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
            document_bytes[row] = len(tokenizer.bytes_of(parts[-1].tolist())) - tokenizer.prefix_bytes
            parts.append(ending)
            document_of.append(np.array([len(documents)]))
    return Stream(
        tokens=np.concatenate(parts).astype(np.int64),
        document_of=np.concatenate(document_of).astype(np.int64),
        document_bytes=document_bytes.astype(np.int64),
    )


@torch.no_grad()
def window_scores(models: Models, tokens_BT1: Tensor, reference: str) -> np.ndarray:
    """Of each predicted token nats, correctness, agreement with and KL from the reference, and confidence, which is
    the probability of the model's first choice: [M, B*T, 5].

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
            log_best_C, best_C = log_p_CV.max(-1)
            nats_C = -log_p_CV.gather(1, targets_N[chunk, None]).squeeze(1)
            kl_C = torch.zeros_like(nats_C) if own else (q_CV * (log_q_CV - log_p_CV)).sum(-1)
            columns = [nats_C, best_C == targets_N[chunk], best_C == reference_best_C, kl_C, log_best_C.exp()]
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
    tables_MGS = np.zeros((len(models), n_documents, len(COLUMNS)))
    signed_MN = np.zeros((len(models), n_tokens), dtype=np.float32)  # confidence, below zero where the choice was wrong
    first = _continue(state, tables_MGS, signed_MN, sequence_tokens)
    if first:
        print(f"evaluate: continuing after window {first:,} of {n_windows:,}", flush=True)
    saved, saved_tokens = time.monotonic(), min(first * sequence_tokens, n_tokens)
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
                signed_MN[:, low:high] = np.where(scores[..., 1] > 0, scores[..., 4], -scores[..., 4])
        done = min(window + batch_sequences, n_windows)
        stopping = interruption is not None and interruption.requested  # asked once, so that no stop goes unsaved
        if state is not None and (stopping or done == n_windows or time.monotonic() - saved >= SAVE_SECONDS):
            state.save(f"{CONFIDENCES}-{saved_tokens}", _as_file(signed_MN[:, saved_tokens:stop]))
            state.save(SUMS, _as_file(np.append(tables_MGS.ravel(), done)))
            saved, saved_tokens = time.monotonic(), stop
        on_batch(done, n_windows)
        if interruption is not None and stopping:
            interruption.check(f"scoring, after window {done:,} of {n_windows:,}")
    tables, scored_N = dict(zip(models, tables_MGS, strict=True)), stream.document_of < n_documents
    for (name, table), signed_N in zip(tables.items(), signed_MN, strict=True):
        table[:, BYTES] = stream.document_bytes
        table[:, TOKENS] = np.bincount(stream.document_of, minlength=n_documents)[:n_documents]
        if not np.isfinite(table).all():
            raise Refusal(
                f"artifacts/{name} has a loss that is not finite on the test split: train this model again"
            )
        table[:, FIRST_GAP:] = calibration_gaps(signed_N[scored_N], stream.document_of[scored_N], n_documents)
    return tables


def _continue(state: ResumeState | None, tables_MGS: np.ndarray, signed_MN: np.ndarray, sequence_tokens: int) -> int:
    """Fills in what was saved and returns the next window; 0, and nothing filled in, where nothing usable was saved.

    The confidences were saved piece by piece, each under the number of its first token.
    """
    if state is None or (sums := _load(state, SUMS, 1)) is None or sums.size != tables_MGS.size + 1:
        return 0
    window = int(sums[-1])
    at, tokens = 0, min(window * sequence_tokens, signed_MN.shape[1])
    while at < tokens:
        name = f"{CONFIDENCES}-{at}"
        piece = _load(state, name, 2)
        if piece is None or len(piece) != len(signed_MN) or not 0 < piece.shape[1] <= tokens - at:
            return 0
        signed_MN[:, at : at + piece.shape[1]] = piece
        at += piece.shape[1]
    tables_MGS[:] = sums[:-1].reshape(tables_MGS.shape)
    return window


def _load(state: ResumeState, name: str, dimensions: int) -> np.ndarray | None:
    """A saved array; None if it is missing or damaged."""
    if (kept := state.load(name)) is None:
        return None
    try:
        array = np.lib.format.read_array(io.BytesIO(kept), allow_pickle=False)
        if array.ndim == dimensions:
            return array
    except (ValueError, MemoryError):  # not these numbers, or more than there are
        pass
    state.say_damaged(name)
    return None


def _as_file(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _add_by_document(tables_MGS: np.ndarray, document_of: np.ndarray, scores: np.ndarray) -> None:
    for table, columns in zip(tables_MGS, scores[..., :4], strict=True):
        for column, values in zip((NATS, CORRECT, AGREEMENT, KL), columns.T, strict=True):
            table[:, column] += np.bincount(document_of, weights=values, minlength=len(table))[: len(table)]


def calibration_gaps(signed_N: np.ndarray, document_of: np.ndarray, n_documents: int) -> np.ndarray:
    """Confidence minus correctness summed by document and bin, [G, BINS]; the bins have equally many tokens each.

    `signed_N` is the confidence of each token, below zero where the first choice was wrong. Among equals the first
    tokens come into the lower bin.
    """
    confidence_N, n_tokens = np.abs(signed_N).astype(float), len(signed_N)
    bin_N = np.empty(n_tokens, dtype=np.int64)
    bin_N[np.argsort(confidence_N, kind="stable")] = np.arange(n_tokens) * BINS // n_tokens
    gap_N = confidence_N - (signed_N > 0)
    summed = np.bincount(document_of * BINS + bin_N, weights=gap_N, minlength=n_documents * BINS)
    return summed.reshape(n_documents, BINS)


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


def calibration_error(bootstrap: Bootstrap, table: np.ndarray) -> Estimate:
    """Expected calibration error of the first choice: the mean over tokens of |confidence - accuracy| of their bin.

    Naeini et al. 2015, with bins of equal mass as in Nguyen & O'Connor 2015. Its resamples lie too high on average,
    as all noise adds to an absolute value; the interval is of the resamples moved back by that.
    """
    value = np.abs(table[:, FIRST_GAP:].sum(0)).sum() / table[:, TOKENS].sum()
    gaps = [bootstrap.ratio(table, column, TOKENS) for column in range(FIRST_GAP, len(COLUMNS))]
    resampled_R = np.abs(gaps).sum(0)
    return estimate(value, np.clip(resampled_R - (resampled_R.mean() - value), 0, None))


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
