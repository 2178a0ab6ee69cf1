"""Reading a prompt and decoding after it: the teacher with its latent cache against transformers' DeepseekV3 with its
DynamicCache, our weights and the best of its experts' implementations; and against ourselves without a cache.

In bf16 both have bf16 weights, as a model is served: ours those that autocast would cast at each token.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.ceiling import DTYPES
from benchmarks.peers import EXPERTS_IMPLEMENTATIONS, INSTALL, batched_mm_bytes, too_large, twin
from benchmarks.table import Row
from benchmarks.timing import DEVICE, Action, Timings, heats_and_final, interleaved
from benchmarks.training_step import REFERENCE, new_teacher
from stages.model.families.deepseek_v3.model import DeepseekV3 as Teacher
from stages.model.families.deepseek_v3.model import DeepseekV3Shape as TeacherShape
from stages.model.generation import Reader
from stages.model.kernels.threads import one_thread

WITHOUT_CACHE = "our own forward without a cache"


class OurText:
    """A text that the teacher reads and continues."""

    def __init__(self, model: Teacher, dtype: torch.dtype, batch: int, capacity: int):
        self.model, self.dtype = model, dtype
        self.reader = Reader(model, batch, capacity) if capacity else None

    def next(self, tokens_BT: Tensor) -> Tensor:
        """The likeliest token after these, which follow what was read before -> [B, 1]."""
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            if self.reader:
                return self.reader.read(tokens_BT).argmax(-1, keepdim=True)
            x_BTD = self.model.features(tokens_BT).x_BTD
            return self.model.head(x_BTD[:, -1]).argmax(-1, keepdim=True)

    def forget(self, tokens: int) -> None:
        if self.reader:
            self.reader.forget(tokens)


class TheirText:
    """The same with transformers' model; its cache grows by itself."""

    def __init__(self, model: nn.Module):
        import transformers

        self.model, self.cache = model, transformers.DynamicCache(config=model.config)

    def next(self, tokens_BT: Tensor) -> Tensor:
        out = self.model(tokens_BT, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def forget(self, tokens: int) -> None:
        self.cache.crop(-tokens)


Start = Callable[[], OurText | TheirText]


def reading(start: Start, prompt_BT: Tensor) -> Action:
    return lambda: start().next(prompt_BT)


def decoding(start: Start, prompt_BT: Tensor, new_tokens: int) -> Action:
    """Greedy tokens after a prompt -> [B, new_tokens]; each call finds the cache as reading the prompt left it."""
    text = start()
    first_B1 = text.next(prompt_BT)

    def run() -> Tensor:
        tokens = [first_B1]
        for _ in range(new_tokens):
            tokens.append(text.next(tokens[-1]))
        text.forget(new_tokens)
        return torch.cat(tokens[1:], dim=1)

    return run


def on_one_thread(action: Action) -> Action:
    """As we decode, which may be better for a peer, too."""

    def run() -> object:
        with one_thread(DEVICE):
            return action()

    return run


def reading_again(start: Start, prompt_BT: Tensor, new_tokens: int) -> Action:
    """The same tokens by reading the whole text anew for each."""
    text = start()
    begun_BT = torch.cat([prompt_BT, text.next(prompt_BT)], dim=1)

    def run() -> Tensor:
        text_BT = begun_BT
        for _ in range(new_tokens):
            text_BT = torch.cat([text_BT, text.next(text_BT)], dim=1)
        return text_BT[:, -new_tokens:]

    return run


def as_served(model: Teacher, dtype: torch.dtype) -> Teacher:
    """A copy whose products need no cast; router and embedding, which autocast leaves alone, stay in float32."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.startswith("embedding") and "router" not in name:
            parameter.data = parameter.data.to(dtype)
    return model


def twins(model: Teacher, dtype: torch.dtype) -> dict[str, nn.Module]:
    """transformers' model with our weights, per implementation of the experts; none where it is not installed."""
    try:
        return {
            f"transformers DeepseekV3 {implementation}": twin(model, implementation).to(dtype)
            for implementation in EXPERTS_IMPLEMENTATIONS
        }
    except ImportError:
        return {}


@torch.no_grad()
def rows(
    shape: TeacherShape = REFERENCE,
    batches: tuple[int, ...] = (1, 8),
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    seconds: float = 3.0,
) -> Iterator[Row | str]:
    capacity = prompt_tokens + new_tokens + 1
    # with a shared expert, as our teachers have one: transformers would run it even at width 0
    model = new_teacher(replace(shape, sequence_tokens=capacity, shared_experts=1)).eval()
    for dtype_name, dtype in DTYPES.items():
        theirs, ours = twins(model, dtype), as_served(model, dtype)
        if not theirs and dtype == next(iter(DTYPES.values())):  # told once
            yield INSTALL
        for batch in batches:
            generator = torch.Generator().manual_seed(0)
            prompt_BT = torch.randint(shape.vocab_size, (batch, prompt_tokens), generator=generator).to(DEVICE)
            starts: dict[str, Start] = {"ours": partial(OurText, ours, dtype, batch, capacity)}
            starts |= {name: partial(TheirText, peer) for name, peer in theirs.items()}
            what = f"batch {batch}, {dtype_name}"
            actions = {name: reading(start, prompt_BT) for name, start in starts.items()}
            needed = batched_mm_bytes(replace(shape, layers=1), prompt_BT.numel())  # of one layer at a time
            for name in [name for name in actions if name.endswith("batched_mm")]:
                if why := too_large(name, needed):
                    del actions[name]
                    yield f"{why} (prefill, {what})"
            yield from against_best(f"prefill of {prompt_tokens}, {what}", actions, prompt_BT.numel(), seconds)
            actions = {name: decoding(start, prompt_BT, new_tokens) for name, start in starts.items()}
            if DEVICE.type == "cpu":
                actions |= {f"{name} on one thread": on_one_thread(actions[name]) for name in theirs}
            decoded, tokens = f"decode of {new_tokens}, {what}", batch * new_tokens
            yield from against_best(decoded, actions, tokens, seconds)
            if batch == 1:
                whole = partial(OurText, ours, dtype, batch, 0)
                both = {"ours": actions["ours"], WITHOUT_CACHE: reading_again(whole, prompt_BT, new_tokens)}
                yield row(decoded, interleaved(both, seconds), WITHOUT_CACHE, tokens)


def against_best(what: str, actions: dict[str, Action], tokens: int, seconds: float) -> Iterator[Row | str]:
    peers = [name for name in actions if name.startswith("transformers")]
    times, best = heats_and_final(actions, peers, seconds, may_fail=peers)
    yield from (f"peer left out: {name}: {what}: {why}" for name, why in times.failed.items())
    if best is not None:
        yield row(what, times, best, tokens)


def row(what: str, times: Timings, against: str, tokens: int) -> Row:
    ours, theirs = (tokens / times.median(name) for name in ("ours", against))
    return Row.of("decoding", what, ours, against, theirs, "tokens/s", times.ratio(against, "ours"), times.rounds)
