"""The comparison of recipes, at a size of no interest. Nothing here is timed."""

import gzip
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from pydantic import BaseModel

from benchmarks import recipe, variants
from benchmarks.training_step import REFERENCE
from stages.measure.flops import flops_per_token
from stages.model.layers import rope_table
from stages.settings import schema as settings
from stages.settings.compose import compose
from stages.training.fit import NextToken

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards mix strong acid".split()


@pytest.fixture(scope="module")
def demo():
    return settings.validate(compose(["scale=demo", "corpus=stdlib"]))


@pytest.fixture(scope="module")
def tiny(tiny_settings):
    return variants.default_recipe(tiny_settings, 512)


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    """Two corpora of files, the second compressed, and one that is not there."""
    monkeypatch.setattr(recipe, "KEPT", tmp_path / "kept")
    for number in range(200):
        text = f".SH NAME\n{number}\n" + "\n".join(" ".join(WORDS[number % 7 :: 1 + i % 3]) for i in range(12))
        (tmp_path / f"{number}.txt").write_text(text)
        (tmp_path / f"{number}.gz").write_bytes(gzip.compress(text.upper().encode()))
    found = {"small": [f"{tmp_path}/*.txt"], "capitals": [f"{tmp_path}/*.gz"], "none": [f"{tmp_path}/*.md"]}
    monkeypatch.setattr(recipe, "CORPORA", found)
    return found


def test_the_dense_twin_costs_a_token_as_much_within_one_percent(demo):
    for shape in (variants.default_recipe(demo, 4096).shape, replace(REFERENCE, shared_experts=1)):
        twin = variants.dense_twin(shape)
        assert twin.dense_layers == shape.layers
        ours, theirs = (flops_per_token(one, shape.sequence_tokens)["total"] for one in (shape, twin))
        assert theirs == pytest.approx(ours, rel=0.01)


def changed(one, other, path=""):
    """Names of the leaves in which two nested dictionaries differ; settings among them count as dictionaries."""
    if isinstance(one, BaseModel):
        one, other = one.model_dump(), other.model_dump()
    if not isinstance(one, dict):
        return {path} if one != other else set()
    return {name for key in one for name in changed(one[key], other[key], key)}


def test_each_variant_changes_what_its_name_says_and_nothing_else(tiny):
    says = {
        "Muon's rate": "muon_learning_rate", "AdamW's rate": "adamw_learning_rate", "initial std": "init_scale",
        "weight decay": "weight_decay", "warm-up": "warmup_share", "decay share": "decay_share",
        "Muon's momentum": "muon_momentum", "batch": "batch_sequences", "embedding": "embedding_scale",
        "residual": "residual_scale", "logit": "logit_scale", "AdamW's epsilon": "adamw_epsilon",
        "query and key": "query_key_norm", "route scale": "route_scale", "balancing": "bias_update_rate",
        "multi-token": "ahead_weight",
    }  # fmt: skip
    found = variants.variants(tiny)
    for name, one in found.items():
        differs = changed(asdict(tiny), asdict(one))
        for begins, field in says.items():
            if name.startswith(begins):
                assert differs == {field}, name
        if "iterations" in name:
            assert differs == {"coefficients"}
        if name.startswith("plain AdamW"):
            assert {"plain", "adamw_learning_rate"} <= differs and ("cosine" in name) == one.cosine
    assert len({repr(one) for one in found.values()}) == len(found)
    assert {"dense_layers"} <= changed(asdict(tiny), asdict(found["dense twin"])) <= {"dense_layers", "dense_width"}


def test_the_initialisation_of_a_variant_is_that_of_its_name(tiny):
    plain = variants.new_model(tiny, seed=1)
    block = plain.blocks[-1]
    scaled = variants.new_model(replace(tiny, init_scale=2.0, embedding_scale=5.0, logit_scale=0.5), seed=1)
    assert torch.equal(scaled.blocks[-1].attention.query.weight, 2 * block.attention.query.weight)
    assert torch.equal(scaled.embedding.weight, 10 * plain.embedding.weight)
    assert torch.equal(scaled.norm.weight, plain.norm.weight / 2)
    silent = variants.new_model(replace(tiny, residual_scale=0.0), seed=1)
    assert not silent.blocks[-1].attention.output.weight.any() and not silent.blocks[-1].mlp.down.any()
    assert silent.blocks[-1].mlp.gate_up.any()


def test_the_optimisers_of_a_variant_are_those_of_its_name(tiny):
    (both,) = variants.new_optimizers(tiny, variants.new_model(tiny, 1))
    assert [group["use_muon"] for group in both.param_groups] == [True, True, False, False]
    adamw = variants.plain_adamw(tiny, 2e-3, cosine=True)
    model = variants.new_model(adamw, 1)
    (only,) = variants.new_optimizers(adamw, model)
    assert sum(p.numel() for group in only.param_groups for p in group["params"]) == sum(
        p.numel() for p in model.parameters()
    )
    factors = [variants.rate_factor(adamw, step, 100) for step in range(100)]
    assert max(factors) == 1.0 and factors[-1] == pytest.approx(0.1) and factors[0] == pytest.approx(0.2)
    with variants.orthogonalisation(replace(tiny, coefficients=(variants.MUON,))):
        few = variants.optimizers.orthogonalise(torch.eye(4) * 3)
    assert not torch.equal(few, variants.optimizers.orthogonalise(torch.eye(4) * 3))


def test_query_and_key_heads_are_normed_so_their_size_does_not_matter(tiny):
    normed = variants.new_model(replace(tiny, query_key_norm=True), seed=1)
    tokens_BT = torch.arange(16).view(2, 8)
    before = normed(tokens_BT)
    with torch.no_grad():
        for block in normed.blocks:
            block.attention.query.weight *= 100.0
    # the epsilon of the norm is all that tells them apart
    torch.testing.assert_close(normed(tokens_BT), before, rtol=0, atol=0.02)


def test_multi_token_prediction_adds_its_weighted_loss_and_sees_no_token_it_predicts(tiny):
    both = replace(tiny, ahead_weight=0.5)
    model, tokens_BT1 = variants.new_model(both, seed=1), torch.arange(18).view(2, 9)
    alone = NextToken(tiny.balance_loss_weight)(model, tokens_BT1)
    outcome = variants.new_objective(both)(model, tokens_BT1)
    assert outcome.parts["cross_entropy"] == alone.parts["cross_entropy"] and len(outcome.loads) == len(alone.loads)
    assert (outcome.loss - alone.loss).item() == pytest.approx(0.5 * torch.log(torch.tensor(512.0)).item(), rel=0.1)
    rope = rope_table(0, 7, tiny.shape.rope_head_dim, tiny.shape.rope_theta, None)
    x_BTD, next_BTD = torch.randn(1, 7, tiny.shape.width), torch.randn(1, 7, tiny.shape.width, requires_grad=True)
    model.ahead(x_BTD, next_BTD, rope)[0, 3].sum().backward()
    assert next_BTD.grad[0, 3].any() and not next_BTD.grad[0, 4:].any()


def test_a_run_takes_the_steps_that_a_rank_takes_and_learns(tiny, corpora, tiny_settings):
    (data,) = recipe.corpora_here(["small"], 0.1, tiny_settings)
    assert len(data.train) > len(data.validation_batches) > 0
    curve = recipe.trained(tiny, data, seed=1, steps=8)
    assert [step for step, _ in curve] == [4, 8] and curve[1][1] < curve[0][1]
    assert recipe.trained(tiny, data, seed=1, steps=8) == curve


def test_the_table_names_every_corpus_and_a_missing_one_is_a_line(tiny, corpora, tiny_settings, tmp_path):
    *here, missing = recipe.corpora_here(list(corpora), 0.1, tiny_settings)
    assert missing == "none left out: not on this machine"
    assert [data.name for data in here] == ["small", "capitals"]
    names = ("default", "dense twin", "plain AdamW 0.001", "batch of 4")
    found = {name: one for name, one in variants.variants(tiny).items() if name in names}
    bench = recipe.Bench(here, tiny, tmp_path / "kept", seeds=(1, 2), rounds=1)
    table = recipe.Table(bench, found, seconds=0.01)
    table.fill()
    each = [bench.curve(tiny, here[0], 0.01, seed)[-1][1] for seed in (1, 2)]
    assert each[0] != each[1] and table.bits["default", "small"] == each
    head, _, *lines = table.rendered().splitlines()
    assert "small" in head and "capitals" in head and len({line.count("|") for line in (head, *lines)}) == 1
    assert sorted(line.split(" | ")[0] for line in lines) == sorted(f"| {name}" for name in names)
    assert [note.split(":")[0] for note in table.notes] == ["small", "capitals"]
    text = recipe.page([table.section(0.1)])
    assert table.rendered() in text and "## 0.01 seconds, up to 0.1 MB of text; seeds: 1, 2\n" in text


def test_what_is_compared_is_the_mean_over_the_seeds_and_its_error_that_of_their_differences():
    bench = SimpleNamespace(corpora=[SimpleNamespace(name="c")], seconds_per_step=lambda recipe: 0.5)
    table = recipe.Table(bench, {"default": None, "other": None}, seconds=1.0)
    table.bits = {("default", "c"): [1.0, 2.0, 3.0], ("other", "c"): [1.1, 2.2, 3.3]}
    *_, default, other = table.rendered().splitlines()
    assert default == "| default | 0.500 | 2 | 2.0000 |"
    assert other == "| other | 0.500 | 2 | 2.2000 (+0.2000 ± 0.0577) |"  # 0.1 / sqrt(3)
    table.bits = {key: bits[:1] for key, bits in table.bits.items()}
    assert table.cell("other", "c") == "1.1000 (+0.1000)"


def test_plain_adamw_is_tuned_on_the_first_corpus_and_its_better_two_compared(tiny, corpora, tiny_settings, tmp_path):
    here = list(recipe.corpora_here(["small", "capitals"], 0.1, tiny_settings))
    plain = {f"plain AdamW {rate:g}": variants.plain_adamw(tiny, rate) for rate in (1e-6, 1e-3, 2e-3)}
    bench = recipe.Bench(here, tiny, tmp_path, seeds=(1,), rounds=1)
    table = recipe.Table(bench, {"default": tiny} | plain, seconds=0.2)
    table.fill()
    tuned, at = table.notes[0].split(": ")[0], "at 1e-06; "
    assert tuned == "plain AdamW was tuned on small, seed 1" and at in table.notes[0]
    assert {name for name, _ in table.bits} == {"default", "plain AdamW 0.001", "plain AdamW 0.002"}
    assert len(table.bits) == 6 and len(table.notes) == 3


def test_a_table_without_time_left_has_only_what_was_kept(tiny, corpora, tiny_settings, tmp_path):
    here = list(recipe.corpora_here(["small"], 0.1, tiny_settings))
    found = {"default": tiny, "batch of 4": replace(tiny, batch_sequences=4)}
    recipe.Table(recipe.Bench(here, tiny, tmp_path, seeds=(1,), rounds=1), {"default": tiny}, 0.01).fill()
    late = recipe.Table(recipe.Bench(here, tiny, tmp_path, seeds=(1,), end=0, rounds=1), found, 0.01)
    late.fill()
    assert not late.complete and list(late.bits) == [("default", "small")] and "batch of 4" not in late.rendered()


def test_only_the_whole_table_is_a_page_and_what_time_forbids_is_a_line_in_it(corpora, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    words = ["--minutes", "0", "--megabytes", "0.1", "--corpora", "small"]
    monkeypatch.setattr(recipe, "LONGER_MEGABYTES", 0.1)
    recipe.main([*words, "--", "dense twin"])
    told = capsys.readouterr().out
    assert told.startswith("## 360 seconds") and "the same command continues" in told and not list(tmp_path.glob("b*"))
    (tmp_path / "benchmarks").mkdir()
    recipe.main(words)
    titles = [line for line in (tmp_path / "benchmarks/recipe.md").read_text().splitlines() if line.startswith("## ")]
    assert titles == [
        "## 360 seconds, up to 0.1 MB of text; seeds: 1, 2, 3",
        "## 1800 seconds, up to 0.1 MB of text; seeds: 1",
        "## 3600 seconds, up to 0.1 MB of text; seeds: 1",
    ]


def test_what_was_measured_is_not_measured_again(tiny, tmp_path):
    bench = recipe.Bench([], tiny, tmp_path)
    assert bench.once(lambda: [1, 2.5], tiny, "a") == [1, 2.5]
    assert bench.once(lambda: pytest.fail("measured twice"), tiny, "a") == [1, 2.5]
    assert bench.once(lambda: [3], replace(tiny, plain=True), "a") == [3]


def test_manual_pages_are_read_as_prose_and_large_files_not_at_all(corpora, tmp_path, monkeypatch):
    texts = list(recipe.documents_of(corpora["capitals"], 10**6))
    assert len(texts) == 200 and not any(".SH" in text for text in texts)
    monkeypatch.setattr(recipe, "LARGEST_FILE", 10)
    assert not list(recipe.documents_of(corpora["small"], 10**6))
