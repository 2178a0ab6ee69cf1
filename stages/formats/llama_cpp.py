"""llama.cpp's own server, in this process, on the loopback interface: what a GGUF file gives there.

    with LlamaCpp(path, threads=2, context_tokens=256) as server:
        ids, tokens_per_second = server.greedy([5, 9, 31], new_tokens=32)
"""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

from stages.files.artifacts import Refusal
from stages.files.extras import extra

# A base model has no chat template, and llama.cpp's default one is marks that ours never read: messages are joined.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class LlamaCpp:
    """Listens from its construction on; `port` 0 takes a free one. Only this machine can ask it."""

    def __init__(self, path: Path, threads: int, context_tokens: int, port: int = 0, name: str = "model"):
        (xllamacpp,) = extra("gguf", "xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.model_alias = {name}
        params.hostnames, params.port = ["127.0.0.1"], port
        params.cors_origins, params.cors_credentials = "", False  # by default any web page could ask it
        params.ui, params.offline, params.endpoint_slots = False, True, False
        params.n_ctx, params.n_parallel, params.fit_params = context_tokens, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.chat_template = PLAIN_TEMPLATE
        params.verbosity = -1
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise Refusal(
                f"llama.cpp does not start with {path.name} on port {port} ({error}): is the port in use?"
            ) from None
        self.address: str = self.server.listening_address
        # no proxy: what the environment names would be asked for the loopback interface too
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.server = None  # it ends with its last reference

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        content, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with self.opener.open(urllib.request.Request(self.address + path, content, kind), timeout=600) as answer:
            return json.loads(answer.read())

    def greedy(self, ids: list[int], new_tokens: int) -> tuple[list[int], float]:
        """The likeliest continuation of these ids, without the end of the text, and the tokens written per second."""
        body = {"prompt": ids, "n_predict": new_tokens, "temperature": 0.0, "samplers": ["temperature"]}
        answer = self.ask("/completion", body | {"return_tokens": True, "cache_prompt": False})
        tokens = answer["tokens"][:-1] if answer["stop_type"] == "eos" else answer["tokens"]
        return tokens, answer["timings"]["predicted_per_second"]

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, in which nothing is a special token."""
        return self.ask("/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]
