"""Continues a text by a model, for a person to see: a command beside the pipeline, no stage of it.

    python -m stages.generate --model student "def "
    python -m stages.generate --model student --temperature 0 --stop "\\ndef " --tokens 200 < prompt.py
    python -m stages.generate --compare teacher,student,sparse_student "def "     # side by side

A model is a name under artifacts/ or a folder. Text goes to standard output as it is written, speed to standard error.
"""

import argparse
import codecs
import itertools
import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stages.files.artifacts import Refusal
from stages.files.streams import fill_closed_streams, whole_output
from stages.model.folders import folder_of

COLUMN_GAP = "  |  "
LEAST_COLUMN = 20  # characters
MOST_TOKENS = 2**20  # memory for all of them is taken at the start


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest at temperature 0, else drawn by the seed."""

    new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]


@dataclass
class Clock:
    """How long a text took. The prompt's tokens are read at once, the new ones written one by one."""

    prompt_seconds: float = 0.0
    write_seconds: float = 0.0
    tokens: int = 0

    def __str__(self) -> str:
        speed = f", {(self.tokens - 1) / self.write_seconds:,.0f} tokens/s" if self.tokens > 1 else ""
        return f"{self.tokens} tokens{speed}, the first after {self.prompt_seconds:.3f} s"


class Writer:
    """A model with its tokenizer, from its folder alone."""

    def __init__(self, word: str):
        import torch  # late: a mistyped option should not wait for it

        from stages.data.hub_tokenizer import load_hub_tokenizer
        from stages.model import hub as models
        from stages.run.provenance import cores

        torch.set_num_threads(cores())
        folder = folder_of(word)
        self.model = models.load(folder).to("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_hub_tokenizer(folder, self.model.shape.vocab_size)

    def write(self, prompt: str, sampling: Sampling, clock: Clock) -> Iterator[str]:
        """The continuation of the prompt, piece by piece; `clock` is filled meanwhile."""
        from stages.model.generation import stream

        end = self.tokenizer.end_of_text
        tokens = self.tokenizer.encode(prompt) or [end]  # a text begins where another ended
        ids = stream(self.model, tokens, sampling.new_tokens, True, sampling.temperature, sampling.seed, end,
                     top_p=sampling.top_p)  # fmt: skip
        yield from until(self._decoded(timed(ids, clock)), sampling.stop)

    def _decoded(self, ids: Iterable[int]) -> Iterator[str]:
        """Text as soon as it is whole: a character of several bytes may be several tokens."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            yield decoder.decode(self.tokenizer.bytes_of([token]))
        yield decoder.decode(b"", final=True)


def timed(ids: Iterator[int], clock: Clock) -> Iterator[int]:
    started = time.perf_counter()
    for token in ids:
        now = time.perf_counter()
        if clock.tokens == 0:
            clock.prompt_seconds = now - started
        clock.write_seconds = now - started - clock.prompt_seconds
        clock.tokens += 1
        yield token


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The text up to the stop that is complete first; what may be the beginning of one is held back until then."""
    held = ""
    for piece in pieces:
        held += piece
        if found := [(held.find(stop) + len(stop), held.find(stop)) for stop in stops if stop in held]:
            yield held[: min(found)[1]]
            return
        begun = max((size for stop in stops for size in range(1, len(stop)) if held.endswith(stop[:size])), default=0)
        yield held[: len(held) - begun]
        held = held[len(held) - begun :]
    yield held


# ---- what is typed and printed


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m stages.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="?", help="the text to continue; default: standard input")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="student", help="a name under artifacts/, or a folder (default: student)")
    which.add_argument("--compare", help="several of them, with commas between")
    parser.add_argument("--tokens", type=int, default=128, help="at most so many new ones (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest token (default: 0.7)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest of this probability together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], help="end before this text; may be given several times")
    return parser.parse_args(words)


def sampling_of(options: argparse.Namespace) -> Sampling:
    if not 1 <= options.tokens <= MOST_TOKENS:
        raise Refusal(f"--tokens {options.tokens}: must be from 1 to {MOST_TOKENS:,}")
    if not 0 <= options.temperature < math.inf:
        raise Refusal(f"--temperature {options.temperature:g}: must be a number from 0 on")
    if not 0 < options.top_p <= 1:
        raise Refusal(f"--top-p {options.top_p:g}: must be above 0 and at most 1")
    if not 0 <= options.seed < 2**63:
        raise Refusal(f"--seed {options.seed}: must be from 0 to 2**63 - 1")
    if "" in options.stop:
        raise Refusal("--stop: an empty text stops everything; name one or more characters")
    return Sampling(options.tokens, options.temperature, options.top_p, options.seed, tuple(options.stop))


def main(words: list[str]) -> None:
    options = arguments(words)
    sampling = sampling_of(options)
    names = options.compare.split(",") if options.compare is not None else [options.model]
    for name in names:
        folder_of(name)  # refused before the first model is loaded
    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    if options.compare is None:
        print_stream(options.model, prompt, sampling)
    else:
        print_columns(names, prompt, sampling)


def print_stream(name: str, prompt: str, sampling: Sampling) -> None:
    clock, writer = Clock(), Writer(name)
    sys.stdout.write(prompt)
    for piece in writer.write(prompt, sampling, clock):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    print(f"{name}: {clock}", file=sys.stderr)


def print_columns(names: list[str], prompt: str, sampling: Sampling) -> None:
    """One model after the other, each with the machine to itself; then all texts beside each other."""
    texts, clocks = [], []
    for name in names:
        clock = Clock()
        texts.append(prompt + "".join(Writer(name).write(prompt, sampling, clock)))
        clocks.append(clock)
    width = (shutil.get_terminal_size((120, 24)).columns - len(COLUMN_GAP) * (len(names) - 1)) // len(names)
    print(side_by_side([names, texts], max(width, LEAST_COLUMN)))
    for name, clock in zip(names, clocks, strict=True):
        print(f"{name}: {clock}", file=sys.stderr)


def side_by_side(rows: Sequence[Sequence[str]], width: int) -> str:
    """Each row of texts as columns of `width` characters, a rule between two rows."""
    rule = COLUMN_GAP.join(["-" * width] * len(rows[0]))
    drawn = []
    for texts in rows:
        columns = [[part for line in text.expandtabs().split("\n") for part in cut(line, width)] for text in texts]
        lines = itertools.zip_longest(*columns, fillvalue="")
        drawn.append("\n".join(COLUMN_GAP.join(f"{part:<{width}}" for part in line).rstrip() for line in lines))
    return f"\n{rule}\n".join(drawn)


def cut(line: str, width: int) -> list[str]:
    return [line[start : start + width] for start in range(0, max(len(line), 1), width)]


def entry() -> Any:
    fill_closed_streams()
    try:
        with whole_output():
            main(sys.argv[1:])
    except Refusal as refusal:
        if isinstance(refusal.__context__, BrokenPipeError):  # the reader, such as `head`, has seen enough
            return 0
        return f"offramp: {refusal}"
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(entry())
