"""Text from a model, token by token, with its key-value (or latent) cache.

ids = generate(model, tokenizer.encode("def main("), new_tokens=64, temperature=0.8, seed=1)
"""

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: list[int],
    new_tokens: int,
    cache: bool = True,
    temperature: float = 0.0,
    seed: int = 0,
    end_of_text: int | None = None,
) -> list[int]:
    """The continuation of `tokens`: up to `new_tokens` ids, the likeliest or, with a temperature, drawn.

    It stops before `end_of_text`. Without the cache every step reads the whole text again: the slow twin.
    """
    if not tokens:
        raise ValueError("generation continues a text: give at least one token")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    layers = model.new_cache(1, len(tokens) + new_tokens) if cache else None
    text, fresh = list(tokens), list(tokens)
    for _ in range(new_tokens):
        tokens_BT = torch.tensor([fresh if cache else text], device=device)
        x_BTD, _ = model.features(tokens_BT, layers)
        token = choose(model.head(x_BTD[0, -1]).float().cpu(), temperature, generator)
        if token == end_of_text:
            break
        text.append(token)
        fresh = [token]
    return text[len(tokens) :]


def choose(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
