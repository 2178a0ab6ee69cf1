"""Serves a student to OpenAI clients on this machine, by llama.cpp: a command beside the pipeline, no stage of it.

    make serve                                                 # installs the extra, serves artifacts/student
    python -m stages.serve --model sparse_student --kind q8_0 --port 8081
    curl 127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "def ", "max_tokens": 32}'

It writes the model as GGUF into a temporary folder and serves that until Ctrl-C, on the loopback interface only.
Chat messages are joined without any mark, because a base model has no chat template.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from stages.files.artifacts import Refusal, read_json
from stages.formats.gguf_file import KINDS, write_gguf
from stages.formats.llama_cpp import LlamaCpp
from stages.model.folders import folder_of
from stages.run.provenance import cores


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m stages.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="student", help="a name under artifacts/, or a folder (default: student)")
    parser.add_argument("--kind", choices=KINDS, default="f16", help="of the matrices (default: f16)")
    parser.add_argument("--port", type=int, default=8080, help="on 127.0.0.1; 0: a free one (default: 8080)")
    options = parser.parse_args(words)
    if not 0 <= options.port < 2**16:
        raise Refusal(f"--port {options.port}: must be from 0 to 65535")
    folder = folder_of(options.model)
    context_tokens = read_json(folder / "config.json")["max_position_embeddings"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the temporary folder goes
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / f"{folder.name}-{options.kind}.gguf"
        write_gguf(folder, path, options.kind)
        with LlamaCpp(path, cores(), context_tokens, options.port, folder.name) as server:
            url = f"{server.address}/v1"
            print(f"serving {folder.name} ({options.kind}) at {url} until Ctrl-C; any text as key", flush=True)
            signal.pause()


def entry() -> Any:
    try:
        main(sys.argv[1:])
    except Refusal as refusal:
        return f"offramp: {refusal}"
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(entry())
