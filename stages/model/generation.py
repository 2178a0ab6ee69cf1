"""Text from a model, token by token, with its key-value (or latent) cache.

ids = generate(model, tokenizer.encode("def main("), new_tokens=64, temperature=0.8, seed=1)

Shapes: B sequences, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stages.model.kernels.experts import GATHERED_TOKENS
from stages.model.kernels.threads import one_thread
from stages.model.layers import GraphLayerCache, LayerCache


class Reader:
    """A text that a model reads, a prompt at once or token by token, and what it expects to follow.

    On a GPU, where a token of a small model takes much longer to launch than to compute, single tokens are read by a
    CUDA graph. It is captured at the first of them, which takes as long as some three tokens without it. On CPU one
    thread of two reads them: up to width 1024 two took as long or longer, for eight texts at once as for one.
    """

    def __init__(self, model: nn.Module, batch: int, capacity: int):
        self.model, self.cache = model, model.new_cache(batch, capacity)
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def read(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, V] of the token after these, which follow what was read before."""
        if tokens_BT.shape[1] > 1:
            return self._logits(tokens_BT, self.cache)
        if tokens_BT.is_cuda and len(tokens_BT) <= GATHERED_TOKENS and self.cache[0].graphs:
            return self._replayed(tokens_BT)
        with one_thread(tokens_BT.device):
            return self._logits(tokens_BT, self.cache)

    def forget(self, tokens: int) -> None:
        """The last so many."""
        for layer in self.cache:
            layer.length -= tokens

    def _logits(self, tokens_BT: Tensor, cache: list[LayerCache]) -> Tensor:
        x_BTD = self.model.features(tokens_BT, cache).x_BTD
        return self.model.head(x_BTD[:, -1])

    def _replayed(self, token_B1: Tensor) -> Tensor:
        graph = self.graph or self._captured(token_B1)
        self.token_B1.copy_(token_B1)
        self.length.fill_(self.cache[0].length)
        for layer in self.cache:
            layer.grow(1)
        graph.replay()
        return self.logits_BV.clone()  # the next replay writes there

    def _captured(self, token_B1: Tensor) -> torch.cuda.CUDAGraph:
        self.token_B1 = token_B1.clone()
        self.length = torch.tensor(self.cache[0].length, device=token_B1.device)
        capacity = self.cache[0].buffers[0].shape[1]

        def step() -> Tensor:
            seen_S = torch.arange(capacity, device=token_B1.device) <= self.length
            return self._logits(self.token_B1, [GraphLayerCache(layer, self.length, seen_S) for layer in self.cache])

        # autocast's casts of weights, kept outside of the graph, would be gone when it is replayed
        with torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()  # libraries set themselves up, which a capture would refuse
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits_BV = step()
        return self.graph


def generate(model: nn.Module, tokens: list[int], new_tokens: int, *args: Any, **options: Any) -> list[int]:
    """All of `stream` at once."""
    return list(stream(model, tokens, new_tokens, *args, **options))


@torch.no_grad()
def stream(
    model: nn.Module,
    tokens: list[int],
    new_tokens: int,
    cache: bool = True,
    temperature: float = 0.0,
    seed: int = 0,
    end_of_text: int | None = None,
    before_each: Callable[[], None] = lambda: None,
    top_p: float = 1.0,
) -> Iterator[int]:
    """The continuation of `tokens`: up to `new_tokens` ids, the likeliest or, with a temperature, drawn.

    It stops before `end_of_text`. `before_each` is called before every token and may raise, to stop it there. Without
    the cache every step reads the whole text again: the slow twin. With `top_p` below 1 a token is drawn from the
    likeliest ones that together have that probability (Holtzman et al. 2020, nucleus sampling).
    """
    if not tokens:
        raise ValueError("generation continues a text: give at least one token")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    reader = Reader(model, 1, len(tokens) + new_tokens) if cache else None
    text, fresh = list(tokens), list(tokens)
    for _ in range(new_tokens):
        before_each()
        if reader:
            logits_V = reader.read(torch.tensor([fresh], device=device))[0]
        else:
            logits_V = model(torch.tensor([text], device=device))[0, -1]
        token = choose(logits_V.float().cpu(), temperature, generator, top_p)
        if token == end_of_text:
            break
        yield token
        text.append(token)
        fresh = [token]


def choose(logits_V: Tensor, temperature: float, generator: torch.Generator, top_p: float = 1.0) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    share_V = (logits_V / temperature).softmax(-1)
    if top_p < 1:
        share_V = nucleus(share_V, top_p)
    return int(torch.multinomial(share_V, 1, generator=generator))


def nucleus(share_V: Tensor, top_p: float) -> Tensor:
    """The probabilities with all but the likeliest at zero: the fewest that sum to `top_p`, at least one."""
    sorted_V, index_V = share_V.sort(descending=True, stable=True)
    before_V = sorted_V.cumsum(-1) - sorted_V
    return torch.zeros_like(share_V).scatter(-1, index_V, torch.where(before_V < top_p, sorted_V, 0.0))
