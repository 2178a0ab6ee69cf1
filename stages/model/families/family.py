"""What the rest of the project asks of a model family.

A family is one folder beside this file: its model, its mapping to a Hugging Face folder, its operations per token
and what can be pruned in it, behind the Protocol `Family`. `stages.model.families.registry` lists the families;
no other module asks which one a model belongs to. Teacher and student are roles, which any family may play.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from stages.files.artifacts import Refusal
from stages.model.families.prunable import Prunable
from stages.model.features import Features
from stages.model.layers import LayerCache

Shape = Any  # the family's frozen dataclass: every number that fixes a model's tensors and arithmetic


class Model(Protocol):
    """What every model has. B sequences, T tokens, D width, V vocabulary, E experts.

    `layers.initialise` scales weights by name: `embedding`, and `output` and `down`, which write to the
    residual stream.
    """

    shape: Shape  # has at least vocab_size, sequence_tokens, layers and width
    embedding: nn.Embedding
    blocks: nn.ModuleList  # checkpointed and compiled one by one
    head: nn.Linear  # [V, D]

    def features(
        self, tokens_BT: Tensor, cache: list[LayerCache] | None = None, layers: Collection[int] = ()
    ) -> Features:
        """What the head reads, [B, T, D], the routing of each MoE layer in order, and the hidden states of `layers`."""

    def forward(self, tokens_BT: Tensor, cache: list[LayerCache] | None = None) -> Tensor:
        """Logits [B, T, V]."""

    def new_cache(self, batch: int, tokens: int) -> list[LayerCache]:
        """One cache a block, for decoding up to `tokens` tokens."""

    def balance(self, loads: list[Tensor], rate: float) -> None:
        """After an optimizer step: moves the routers towards an even load, from the loads [E] of that step."""


class PlainHeads(NamedTuple):
    """An attention as if each head had its own query, key and value. H heads, N tokens, d query head, U value head."""

    query_HNd: Tensor  # the unrotated dimensions first; those to be rotated, halves paired, are not rotated yet
    key_HNd: Tensor
    value_HNU: Tensor
    output_HDU: Tensor
    rotated: int  # how many of d
    key_groups: int | None = None  # neighbouring heads of a group share their key; None: all share its rotated part
    # Weights [d] of a norm over each head that comes after, where the student has it too: query and key are before it.
    query_norm_d: Tensor | None = None
    key_norm_d: Tensor | None = None


class DenseNeurons(NamedTuple):
    """An MLP as if it were one SwiGLU. F neurons, D width."""

    origins: list[str]  # of each neuron: mlp | shared | experts
    score_F: Tensor  # its mean contribution to the residual stream
    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor  # scaled by the mean gate of its expert


class Routing(NamedTuple):
    """How a mixture of experts chooses; the defaults are those of conf/base.yaml."""

    gating: str = "sigmoid"  # sigmoid | softmax
    route_scale: float = 1.0  # of the gates' sum


class DenseSource(Protocol):
    """How a dense student reads another model; x_ND is the input of the attention or of the MLP of a block."""

    def unfit(self, model: Any) -> str | None:
        """Why no student can start from this model, after "as"; None: it can."""

    def embedding(self, model: Any) -> Tensor:
        """[V, D]: what a token brings into the residual stream."""

    def head(self, model: Any) -> Tensor:
        """[V, D]: what makes logits of the last norm's output, without a cap."""

    def plain_heads(self, block: Any, x_ND: Tensor) -> PlainHeads: ...

    def dense_neurons(self, block: Any, x_ND: Tensor) -> DenseNeurons: ...


class Unsupported(Refusal):
    """A sound config of another arithmetic than a family's own classes have: another family may take it."""


class Family(Protocol):
    """One kind of model. Wrong input ends in a `Refusal`, which names the file or the field."""

    name: str  # the word for it, and its folder
    model_types: tuple[str, ...]  # `model_type` in the config.json of its models
    shape_type: type

    def build(self, shape: Shape) -> Any:
        """A `Model` of this shape; its weights are not initialised."""

    def initialise(self, model: Any, seed: int) -> None:
        """Fresh weights on the CPU for a model that has none yet; they depend on the seed alone."""

    def broken_rules(self, shape: Shape) -> Iterator[tuple[str, str]]:
        """Each field that does not fit, with the rule: ("heads", "must be a multiple of kv_heads (2)")."""

    # ---- Hugging Face

    def config_of(self, shape: Shape) -> dict[str, Any]:
        """The part of config.json that describes the architecture."""

    def shape_from(self, config: dict[str, Any], path: Path) -> Shape:
        """The inverse; refuses a config that the model's arithmetic does not follow. `path` is for messages."""

    def read(self, folder: Path, shape: Shape, recorded_sha256: str | None) -> Any:
        """The model of a folder, by a reader of the family's own; None: `from_hub` reads it."""

    def to_hub(self, model: Any) -> dict[str, Tensor]:
        """The weights by the names, and in the layout, that transformers has."""

    def from_hub(self, tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
        """The inverse, of float32 tensors, which it takes out: a state dict of `model`, whose weights are not read."""

    # ---- cost

    def flops_per_token(self, shape: Shape, context_tokens: int) -> dict[str, float]:
        """Forward operations per token by part, averaged over the positions of a context of so many tokens."""

    def active_parameters(self, model: Any) -> int:
        """Parameters that one token uses: of the routed experts, only the chosen ones."""

    def routing(self, shape: Shape) -> Routing | None:
        """How its routers choose; None where it has none."""

    # ---- pruning

    def prunable(self, model: Any) -> list[Prunable]:
        """Every place in the model whose units may leave it. A smaller model has the same places by the same names."""

    def pruned_shape(self, shape: Shape, kept: Callable[[str, int], int]) -> Shape:
        """The shape after pruning: `kept("heads", 8)` says how many of 8 stay; all layers alike."""

    # ---- the warm start of a dense student

    dense_source: DenseSource | None  # None: no student starts from its models
    dense_target: bool  # its blocks have the parts of Qwen3's, by the same names: its models may start from a source
