"""A dense model as a folder that ONNX Runtime GenAI writes text with: a graph with a key-value cache, and a tokenizer.

The package's own builder makes it, float32 for CPU. The builder is a script for the command line: it runs in a process
of its own, with no network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.files.artifacts import Refusal, read_json
from stages.files.extras import extra
from stages.model.families.registry import family_of
from stages.model.hub import shape_from

BUILDER = "onnxruntime_genai.models.builder"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def write_onnx_genai(folder: Path, out: Path) -> None:
    """Writes the folder `out`, whole or not at all. A mixture is refused: the builder has none of ours."""
    extra("genai", "onnxruntime_genai", "onnx_ir", "transformers")
    shape = shape_from(read_json(folder / "config.json"), folder / "config.json")
    if not family_of(shape).dense_target:
        what = f"{folder}: no graph for ONNX Runtime GenAI of the family {family_of(shape).name}"
        raise Refusal(f"{what}: only models of our own dense class are written (Llama, Mistral, Qwen2, Qwen3)")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as scratch:
        built = Path(scratch) / "built"
        words = [sys.executable, "-m", BUILDER, "-m", str(folder), "-i", str(folder), "-o", str(built)]
        words += ["-p", "fp32", "-e", "cpu", "-c", str(Path(scratch) / "cache")]
        done = subprocess.run(words, env=os.environ | OFFLINE, capture_output=True, text=True, check=False)
        if done.returncode or not (built / "genai_config.json").is_file():
            said = (done.stderr.strip() or done.stdout.strip() or "it wrote nothing").splitlines()[-1]
            raise Refusal(f"{folder}: the builder of ONNX Runtime GenAI does not take it ({said[:300]})")
        shutil.rmtree(out, ignore_errors=True)
        built.replace(out)


class GenAiModel:
    """The folder in ONNX Runtime GenAI on CPU."""

    def __init__(self, folder: Path):
        (self.runtime,) = extra("genai", "onnxruntime_genai")
        self.model: Any = self.runtime.Model(str(folder))

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, V]: what it reads before the first new token."""
        rows = [self._reader(row, len(row) + 1) for row in tokens_BT.numpy().astype(np.int32)]
        return torch.stack([torch.from_numpy(np.array(row.get_output("logits"))[0]) for row in rows]).float()

    def greedy(self, ids: list[int], new_tokens: int) -> tuple[list[int], float]:
        """The likeliest continuation to the end of the text, and the seconds that it took after the second token."""
        reader, found, times = self._reader(np.array(ids, np.int32), len(ids) + new_tokens), [], []
        while not reader.is_done():
            reader.generate_next_token()
            found.append(int(reader.get_next_tokens()[0]))
            times.append(time.perf_counter())
        return found, times[-1] - times[min(1, len(times) - 1)]

    def _reader(self, ids_T: np.ndarray, most_tokens: int) -> Any:
        params = self.runtime.GeneratorParams(self.model)
        params.set_search_options(max_length=most_tokens, do_sample=False)
        reader = self.runtime.Generator(self.model, params)
        reader.append_tokens(ids_T)
        return reader
