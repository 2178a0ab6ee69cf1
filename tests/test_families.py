"""A model family and a pruning score that this file adds pass through everything the project does with one."""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from stages.compress import scores
from stages.compress.pruning import prune
from stages.compress.scores import importance
from stages.compress.warm_start import initialise_student
from stages.files.artifacts import Refusal
from stages.measure.flops import active_parameters, counted_flops_per_token, flops_per_token, total_parameters
from stages.model.families import registry
from stages.model.families.family import Routing
from stages.model.families.prunable import Cut, Prunable
from stages.model.features import Features
from stages.model.generation import generate
from stages.model.hub import load, new_model, save
from stages.model.layers import LayerCache, initialise
from stages.settings import model_types
from stages.settings.schema import SparsifyScore
from stages.training.callbacks import BalanceExperts
from stages.training.fit import NextToken


@dataclass(frozen=True)
class PoolingShape:
    vocab_size: int
    sequence_tokens: int
    layers: int
    width: int
    hidden: int


class PoolingBlock(nn.Module):
    """The mean of what came before instead of attention, and an MLP with a ReLU."""

    def __init__(self, shape: PoolingShape):
        super().__init__()
        self.widen = nn.Linear(shape.width, shape.hidden, bias=False)
        self.narrow = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x_BTD: Tensor, cache: LayerCache | None = None) -> Tensor:
        seen_BSD = x_BTD if cache is None else cache.append(x_BTD)[0]
        count_S1 = torch.arange(1, seen_BSD.shape[1] + 1)[:, None]
        mean_BTD = (seen_BSD.cumsum(dim=1) / count_S1)[:, -x_BTD.shape[1] :]
        return x_BTD + self.narrow(F.relu(self.widen(x_BTD + mean_BTD)))


class Pooling(nn.Module):
    def __init__(self, shape: PoolingShape):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.width)
        self.blocks = nn.ModuleList(PoolingBlock(shape) for _ in range(shape.layers))
        self.head = nn.Linear(shape.width, shape.vocab_size, bias=False)

    def features(self, tokens_BT: Tensor, cache: list[LayerCache] | None = None, layers=()) -> Features:
        x_BTD, hidden = self.embedding(tokens_BT), {}
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, cache[layer] if cache else None)
            if layer in layers:
                hidden[layer] = x_BTD
        return Features(x_BTD, [], hidden)

    def forward(self, tokens_BT: Tensor, cache: list[LayerCache] | None = None) -> Tensor:
        return self.head(self.features(tokens_BT, cache)[0])

    def new_cache(self, batch: int, tokens: int) -> list[LayerCache]:
        return [LayerCache(torch.zeros(batch, tokens, self.shape.width)) for _ in self.blocks]

    def balance(self, loads: list[Tensor], rate: float) -> None:
        pass


class PoolingFamily:
    name = "pooling"
    model_types = ("pooling",)
    shape_type = PoolingShape
    dense_source = None
    dense_target = False

    def build(self, shape: PoolingShape) -> Pooling:
        return Pooling(shape)

    def initialise(self, model: Pooling, seed: int) -> None:
        initialise(model.to_empty(device="cpu"), model.shape.layers, seed)

    def broken_rules(self, shape: PoolingShape) -> Iterator[tuple[str, str]]:
        if shape.hidden < shape.width:
            yield "hidden", f"must be at least width ({shape.width})"

    def config_of(self, shape: PoolingShape) -> dict:
        return {"model_type": "pooling", "architectures": ["Pooling"], **vars(shape)}

    def shape_from(self, config: dict, path: Path) -> PoolingShape:
        return PoolingShape(**{name: config[name] for name in get_type_hints(PoolingShape)})

    def read(self, folder: Path, shape: PoolingShape, recorded_sha256: str | None) -> None:
        """By from_hub."""

    def to_hub(self, model: Pooling) -> dict[str, Tensor]:
        return {f"transformer.{name}": part for name, part in model.state_dict().items()}

    def from_hub(self, tensors: dict[str, Tensor], model: Pooling) -> dict[str, Tensor]:
        return {name.removeprefix("transformer."): part.float() for name, part in tensors.items()}

    def flops_per_token(self, shape: PoolingShape, context_tokens: int) -> dict[str, float]:
        return {"mlp": 4 * shape.layers * shape.width * shape.hidden, "head": 2 * shape.width * shape.vocab_size}

    def active_parameters(self, model: Pooling) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    def routing(self, shape: PoolingShape) -> None:
        return None

    def prunable(self, model: Pooling) -> list[Prunable]:
        return [self._neurons(block, f"blocks.{index}") for index, block in enumerate(model.blocks)]

    def _neurons(self, block: PoolingBlock, at: str) -> Prunable:
        def output_norms(a_BTF: Tensor) -> tuple[Tensor, Tensor]:
            a_NF = a_BTF.flatten(0, 1).double()
            return a_NF.abs().sum(dim=0) * block.narrow.weight.double().norm(dim=0), torch.tensor(float(len(a_NF)))

        cuts = Cut(f"{at}.widen.weight", 0), Cut(f"{at}.narrow.weight", 1)
        return Prunable("neurons", f"{at}.hidden", block.narrow.in_features, block.narrow, cuts, output_norms)

    def pruned_shape(self, shape: PoolingShape, kept: Callable[[str, int], int]) -> PoolingShape:
        return replace(shape, hidden=kept("neurons", shape.hidden))


SHAPE = PoolingShape(vocab_size=30, sequence_tokens=12, layers=2, width=8, hidden=32)
TOKENS_BT1 = torch.randint(30, (4, 13), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pooling(monkeypatch):
    monkeypatch.setattr(registry, "FAMILIES", [*registry.FAMILIES, PoolingFamily()])


def test_a_family_of_ones_own_is_built_saved_loaded_counted_pruned_and_trained(pooling, tmp_path):
    save(new_model(SHAPE, seed=1), tmp_path / "dense")
    model = load(tmp_path / "dense")
    assert model.shape == SHAPE
    assert flops_per_token(SHAPE, 12)["total"] == counted_flops_per_token(model, 12)
    assert active_parameters(model) == total_parameters(model)
    with torch.no_grad():
        for block in model.blocks:
            block.narrow.weight[:, ::2] = 0  # half of the neurons write nothing
    found = importance(model, [TOKENS_BT1], {"heads": "taylor", "neurons": "contribution", "experts": "reap"})
    smaller = prune(model, {"neurons": 0.5}, found)
    assert smaller.shape == replace(SHAPE, hidden=16)
    with torch.no_grad():
        torch.testing.assert_close(smaller(TOKENS_BT1), model(TOKENS_BT1))
    optimizer, losses = torch.optim.AdamW(smaller.parameters(), lr=0.01), []
    for _ in range(2):
        outcome = NextToken()(smaller, TOKENS_BT1)
        losses.append(outcome.loss.item())
        outcome.loss.backward()
        optimizer.step()
    assert losses[1] < losses[0] and outcome.loads == []
    save(smaller, tmp_path / "sparse")
    assert torch.equal(load(tmp_path / "sparse").head.weight, smaller.head.weight)
    assert len(generate(smaller.eval(), [1, 2, 3], 4, True, 1.0, 0, None)) == 4


def test_a_teacher_without_experts_is_profiled_with_the_default_gating(pooling):
    from stages.profile import router_time

    base = yaml.safe_load((Path(__file__).parent.parent / "conf/base.yaml").read_text())["teacher"]
    assert Routing() == Routing(base["gating"], base["route_scale"])
    row = router_time(tokens=64, shape=SHAPE, experts=4, per_token=2, repetitions=1, seed=0)
    assert row["width"] == 8 and row["ours_microseconds"] > 0


def test_the_load_of_a_family_of_ones_own_is_kept_by_layer_whatever_its_shape_says():
    class Model:
        def balance(self, loads, rate):
            self.loads = loads

    model, progress = Model(), SimpleNamespace(recent_loads=[])
    module = SimpleNamespace(loads=torch.arange(6.0), mixtures=2, model=model, progress=progress)
    module.fit = SimpleNamespace(bias_update_rate=0.1)
    BalanceExperts().after_step(None, module)
    assert [load.tolist() for load in model.loads] == [[0, 1, 2], [3, 4, 5]]
    assert progress.recent_loads == [[[0, 1, 2], [3, 4, 5]]]


def test_its_rules_hold_for_models_on_disk(pooling, tmp_path):
    with pytest.raises(Refusal, match=r"hidden \(4\) must be at least width \(8\)"):
        new_model(replace(SHAPE, hidden=4), seed=1)


def test_what_it_has_not_is_refused_in_one_line(pooling):
    model = new_model(SHAPE, seed=1)
    with pytest.raises(Refusal, match="keep_experts = 0.5: a model of the family pooling has none: set it to 1"):
        prune(model, {"neurons": 0.5, "experts": 0.5}, {})
    with pytest.raises(Refusal, match="a pooling student cannot start from a pooling teacher"):
        initialise_student(model, model, [TOKENS_BT1])


def test_a_pruning_score_is_one_function_by_a_word(pooling, monkeypatch):
    def last_ones(model, places, batches):
        return [torch.arange(place.units, dtype=torch.float64) for place in places]

    monkeypatch.setitem(scores.SCORES["neurons"], "last", last_ones)
    model = new_model(SHAPE, seed=1)
    smaller = prune(model, {"neurons": 0.5}, importance(model, [TOKENS_BT1], {"neurons": "last"}))
    assert torch.equal(smaller.blocks[0].widen.weight, model.blocks[0].widen.weight[16:])


def test_the_words_that_settings_accept_are_the_scores_there_are():
    hints = get_type_hints(SparsifyScore)
    assert {kind: set(get_args(hint)) for kind, hint in hints.items()} == {
        kind: set(words) for kind, words in scores.SCORES.items()
    }


def test_no_module_outside_the_families_asks_which_family_a_model_belongs_to():
    words = (*(family.shape_type.__name__ for family in registry.FAMILIES), "MoE", "SwiGLU", "shape,", "mlp", "experts")
    asking = []
    for path in (Path(__file__).parent.parent / "stages").rglob("*.py"):
        if "families" not in path.parts:
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            asked = [ast.unparse(call) for call in calls if ast.unparse(call.func) in ("isinstance", "hasattr", "type")]
            asking += [(path.name, call) for call in asked if any(word in call for word in words)]
    assert not asking


def test_the_words_that_config_knows_a_teachers_folder_by_are_those_of_the_families():
    known = {*model_types.KNOWN, model_types.SOFTMAX_TYPE, model_types.CONFIDENCE_TYPE}
    assert known == {word for family in registry.FAMILIES for word in family.model_types}
    cuttable = [family for family in registry.FAMILIES if family.dense_target]
    assert model_types.DENSE == tuple(word for family in cuttable for word in family.model_types)
