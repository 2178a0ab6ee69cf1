"""The benchmarks compare equals: each of our rows computes the numbers of its peer. Nothing here is timed."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from itertools import repeat

import pytest
import torch
from torch.nn.functional import one_hot

from benchmarks import __main__ as bench
from benchmarks import (
    ceiling,
    checkout,
    checkpoint,
    data,
    ddp,
    decoding,
    determinism,
    losses,
    moe_layer,
    peers,
    pipeline,
    router,
    startup,
    table,
    timing,
    tracking,
    training_step,
)
from stages.data.shards import Tokens, Windows
from stages.files.artifacts import ROOT
from stages.measure.flops import flops_per_token

SHAPE = replace(
    training_step.REFERENCE, vocab_size=64, sequence_tokens=12, layers=2, width=32, heads=2, nope_head_dim=8,
    rope_head_dim=4, value_head_dim=8, latent_width=16, dense_width=16, experts=4, expert_width=16,
)  # fmt: skip


# what a GPU machine with nothing but torch does not have
ABSENT = (
    "dvc", "filelock", "hydra", "lightning", "mlflow", "omegaconf", "safetensors", "tabulate", "tokenizers", "tqdm",
    "transformers", "yaml",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def both_precisions():
    """Whatever this machine's matrix units have; and a ceiling of no interest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceiling, "SQUARE", 32)
        patch.setitem(ceiling.DTYPES, "bf16", torch.bfloat16)
        yield


def rows_of_one_device() -> list:
    """The groups that run on any machine with torch, at a size of no interest."""
    return [
        *ceiling.rows(square=32, seconds=0),
        *training_step.rows(SHAPE, sequences=(2,), seconds=0, least_rounds=1),
        *determinism.rows(SHAPE, sequences=2, seconds=0, least_rounds=1),
        *moe_layer.rows(tokens=(16,), experts=(4,), width=16, expert_width=8, seconds=0),
        *router.rows(sizes=((4, 2),), tokens=16, width=16, expert_width=8, seconds=0),
        *losses.rows({50: 16}, student_width=8, teacher_width=12, seconds=0),
        *decoding.rows(SHAPE, batches=(1, 2), prompt_tokens=8, new_tokens=4, seconds=0),
    ]


@pytest.fixture(scope="module")
def small_rows(both_precisions) -> list:
    """Every group that needs no pipeline before it."""
    return [
        *rows_of_one_device(),
        *data.rows(tokens=20_000, sizes=((2, 16),), batches=2, seconds=0),
        *checkpoint.rows({"little": 4800}, seconds=0),
        *startup.rows({"nothing": ("json", "re")}, {"report": "yaml"}, seconds=0, least_rounds=1),
        *tracking.rows((*tracking.WORDS, "prepare.max_documents=20"), seconds=0, least_rounds=1),
    ]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy with data, where `pretrain` was stopped at its first step and then ran by hand in one process."""
    tree = startup.prepared(tmp_path_factory.mktemp("tree"), {"pretrain": "lightning"})
    assert startup.seconds_to_first_step(tree, "pretrain") > 0
    assert not (tree / "artifacts/teacher").exists()
    assert ddp.step_seconds(tree, ranks=1, steps=5) > 0
    return tree


def test_every_group_gives_rows_with_positive_finite_ratios(small_rows):
    rows = [row for row in small_rows if isinstance(row, table.Row)]
    assert {row.group for row in rows} == {
        "matmul ceiling", "training step", "MoE layer", "router", "distillation loss", "checkpoint", "start-up",
        "tracking", "deterministic kernels", "decoding", "data",
    }  # fmt: skip
    for row in rows:
        assert 0 < row.low <= row.high < float("inf") and 0 < row.ratio < float("inf"), row
        assert row.ours > 0 and row.theirs > 0 and row.rounds >= 1


def test_the_groups_of_one_device_need_torch_numpy_and_a_peer_alone():
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); from tests import test_benchmarks as tests; "
    code += "tests.rows_of_one_device()"  # all of benchmarks is imported by then
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_machine_without_bf16_is_told_so_and_measured_in_float32(monkeypatch):
    monkeypatch.delitem(ceiling.DTYPES, "bf16")
    found = list(ceiling.rows(square=32, seconds=0))
    assert ["bf16 left out" in line for line in found if isinstance(line, str)] == [True]
    assert {row.what.split(", ")[-1] for row in found if isinstance(row, table.Row)} == {"float32"}


def test_the_steps_of_a_run_by_hand_are_read_from_its_record(tree):
    assert (tree / "outputs/1/artifacts/teacher").is_dir()
    assert ddp.tokens_per_step(tree) == 8 * 64
    assert [event["step"] for event in checkout.events(tree, "pretrain") if event.get("step")] == [1, 2, 3, 4, 5]


def test_every_collective_of_a_step_is_timed():
    times = ddp.collectives(floats=1000, muon_floats=600, rounds=2)
    assert len(times.seconds) == len(ddp.BUCKETS_MB) + 2 and min(map(times.median, times.seconds)) > 0
    assert times.rounds == 2


def test_the_time_of_a_real_stage_is_split_into_steps_validation_and_what_comes_after(tree):
    record = checkout.events(tree, "pretrain")
    split = pipeline.spent(record)
    assert min(split.steps, split.validation, split.saving) > 0
    assert split.steps + split.besides < record[-1]["time"] - record[0]["time"]


def test_what_validation_takes_is_the_difference_between_a_steps_end_and_its_row():
    def row(fit, step, written, elapsed):
        return {"step": step, "time": written, "values": {f"{fit}/tokens_per_second": step * 2 * 10 / elapsed}}

    record = [
        {"time": 90.0, "params": {"distill.batch_sequences": "2", "sequence_tokens": "10"}},
        row("student", 10, 110.0, 10.0),
        row("student", 20, 123.0, 20.0),  # validated for 3 s
        row("student", 30, 138.0, 33.0),  # and for 5 s
        row("control", 10, 151.0, 10.0),  # started at 141
        row("control", 20, 163.0, 20.0),  # validated for 2 s
        {"time": 170.0},
    ]
    split = pipeline.spent(record)
    assert (split.steps, split.validation, split.saving) == pytest.approx((30 + 20, 3 + 5 + 2, 7))


def test_a_cold_repro_is_split_by_what_its_stages_wrote(tree, monkeypatch):
    (tree / "measurements/evaluate.json").write_text('{"seconds": {"scoring": 1.5, "counting": 0.5}}')
    monkeypatch.setattr(pipeline, "TRAINING", ("pretrain",))
    rows = [row for row in pipeline.cold_rows(tree, "tiny", whole=1000.0) if isinstance(row, table.Row)]
    assert [row.against for row in rows] == ["the whole", "with validation, checkpoint, saving, tracking"]
    assert rows[0].ours > 2 and rows[0].theirs == 1000 and all(0 < row.ratio < 1 for row in rows)


def test_every_expert_implementation_that_fits_is_a_peer_in_both_precisions(small_rows):
    pytest.importorskip("transformers")
    against = {(row.what, row.against) for row in small_rows if getattr(row, "group", "") == "training step"}
    for what in ("teacher, 2 x 12 tokens, float32", "teacher, 2 x 12 tokens, bf16"):
        for kind in ("Mixtral", "DeepseekV3"):
            for implementation in peers.EXPERTS_IMPLEMENTATIONS:
                assert (what, f"transformers {kind} {implementation}") in against
        assert (what, training_step.DENSE) in against
        assert any(w == what and name.startswith("matmul ceiling") for w, name in against)


def test_the_table_renders_every_row_aligned_and_the_files_say_what_they_were_measured_on(small_rows):
    rows = [row for row in small_rows if isinstance(row, table.Row)]
    lines = table.rendered(rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert len({line.count("|") for line in lines}) == 1 and len({len(line) for line in lines}) == 1
    under = table.conditions()
    markdown = table.as_markdown(rows, ["peer left out: x"], under)
    assert f"- commit: {under['commit']}" in markdown and "- peer left out: x" in markdown
    assert table.rendered(rows) in markdown
    plain = json.loads(table.as_json(rows, [], under))
    assert len(plain["rows"]) == len(rows) and plain["conditions"]["torch"] == version("torch")


def test_running_some_groups_prints_the_table_and_leaves_the_results_alone(capsys, monkeypatch):
    monkeypatch.setitem(bench.GROUPS, "router", lambda: router.rows(((4, 2),), 16, 16, 8, 0))
    monkeypatch.setattr(bench, "write_atomically", lambda *_: pytest.fail("wrote results of a part"))
    bench.main(["router"])
    assert "| router" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no group 'ruoter'"):
        bench.main(["ruoter"])


@pytest.mark.parametrize(
    ("device", "bfloat16", "name"),
    [("cpu", True, "results"), ("cpu", False, "results_float32"), ("cuda", True, "results_gpu")],
)
def test_no_kind_of_machine_overwrites_the_results_of_another(monkeypatch, device, bfloat16, name):
    monkeypatch.setattr(table, "DEVICE", torch.device(device))
    monkeypatch.setattr(table, "has_bfloat16", lambda _: bfloat16)
    assert table.of_this_machine("results") == name


def test_a_whole_run_writes_the_table_for_people_and_for_programs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "of_this_machine", str)
    monkeypatch.setattr(bench, "GROUPS", {"router": lambda: router.rows(((4, 2),), 16, 16, 8, 0)})
    bench.main([])
    printed = capsys.readouterr().out
    assert "| router" in printed and "| router" in (tmp_path / "benchmarks" / "results.md").read_text()
    plain = json.loads((tmp_path / "benchmarks" / "results.json").read_text())
    assert [row["group"] for row in plain["rows"]] == ["router"] * 5
    assert {"commit", "processor", "cores", "torch", "transformers"} <= plain["conditions"].keys()


def test_a_missing_peer_is_a_line_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = {
        "step": list(training_step.rows(SHAPE, sequences=(2,), seconds=0, least_rounds=1)),
        "layer": list(moe_layer.rows(tokens=(16,), experts=(4,), width=16, expert_width=8, seconds=0)),
        "decoding": list(decoding.rows(SHAPE, batches=(1,), prompt_tokens=8, new_tokens=4, seconds=0)),
    }
    for lines in found.values():
        assert [line for line in lines if isinstance(line, str) and "left out" in line] == [peers.INSTALL]
    against = {name: {row.against for row in lines if isinstance(row, table.Row)} for name, lines in found.items()}
    assert against == {
        "step": {"matmul ceiling, float32", "matmul ceiling, bf16"},
        "layer": {moe_layer.LOOP},
        "decoding": {decoding.WITHOUT_CACHE},
    }


def test_a_peer_too_large_for_the_memory_is_a_line_and_not_a_crash(monkeypatch):
    monkeypatch.setattr(peers, "free_bytes", lambda: 1000)
    monkeypatch.setattr(peers, "peer_model", lambda kind, implementation, shape: implementation)
    found = list(peers.peer_models(SHAPE, 24, ("Mixtral", "DeepseekV3")))
    assert [one[1]() for one in found if isinstance(one, tuple)] == ["eager", "grouped_mm"] * 2
    of = f"batched_mm ({SHAPE.layers} layers of {SHAPE.experts} experts, 24 tokens) would take"
    assert sum(of in one for one in found if isinstance(one, str)) == 2
    (line,) = losses.rows({50: 16}, student_width=8, teacher_width=12, seconds=0)
    assert "the plain loss" in line and "would take" in line


def test_a_peer_that_raises_is_left_out_and_our_own_failure_is_not_hidden():
    def broken():
        raise RuntimeError("no kernel\nfor this machine")

    times = timing.interleaved({"ours": lambda: None, "peer": broken}, 0, may_fail=["peer"])
    assert times.failed == {"peer": "RuntimeError: no kernel"} and list(times.seconds) == ["ours"]
    with pytest.raises(RuntimeError):
        timing.interleaved({"ours": broken}, 0)


def test_one_by_one_makes_an_action_when_the_one_before_is_done():
    seen = []

    def maker(name):
        seen.append(f"make {name}")
        return lambda: seen.append(name)

    def broken():
        raise MemoryError("no room")

    makers = {"ours": partial(maker, "ours"), "peer": broken, "other": partial(maker, "other")}
    times = timing.one_by_one(makers, rounds=2, warm_up=1, may_fail=["peer"])
    assert seen == ["make ours", *["ours"] * 3, "make other", *["other"] * 3]
    assert times.failed == {"peer": "MemoryError: no room"} and times.rounds == 2
    with pytest.raises(MemoryError):
        timing.one_by_one({"ours": broken}, rounds=1, warm_up=0)


def test_rounds_are_interleaved_and_the_ratio_is_of_medians():
    calls = []
    actions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.interleaved(actions, 0, least_rounds=2)
    assert calls == ["a", "b", "a", "b", "b", "a"] and times.rounds == 2
    ratio = timing.Timings({"a": [2.0, 4.0, 60.0], "b": [1.0, 2.0, 3.0]}, {}).ratio("a", "b")
    assert ratio == timing.Ratio(2.0, 2.0, 11.0)


def test_what_made_a_peer_the_best_of_several_is_not_what_it_is_judged_by(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "_seconds", lambda action: action())

    def taking(name, *heats, final=4.0):  # the first call of each is a warm-up
        left = [0.0, *heats]
        return lambda: calls.append(name) or (left.pop(0) if left else final)

    def broken():
        raise MemoryError("no room")

    actions = {"ours": taking("ours", 2, 2, 2, final=2.0), "other": taking("other", 9, 9, 9, final=9.0)}
    actions |= {"lucky": taking("lucky", 1, 1, 1), "slow": taking("slow", 3, 3, 3), "broken": broken}
    rivals = "lucky", "slow", "broken"
    times, best = timing.heats_and_final(actions, rivals, 0, may_fail=["broken"], rounds=5)
    assert best == "lucky" and times.ratio(best, "ours").ratio == 2.0
    assert times.seconds.keys() == {"ours", "other", "lucky"} and times.rounds == 5
    assert calls.count("slow") == 4 and times.failed == {"broken": "MemoryError: no room"}


def sizes_of(model):
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def test_the_step_whose_cost_is_measured_runs_on_deterministic_kernels_alone():
    seen = []
    determinism.switched(lambda: seen.append(torch.are_deterministic_algorithms_enabled()), True)()
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("implementation", peers.EXPERTS_IMPLEMENTATIONS)
def test_the_deepseek_peer_with_our_weights_follows_our_losses(implementation, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(training_step, "BALANCE_LOSS_WEIGHT", 0.0)  # the peer has neither
    monkeypatch.setattr(training_step, "BIAS_UPDATE_RATE", 0.0)
    from stages.model import hub as models  # late: ABSENT

    ours = training_step.new_teacher(SHAPE)
    models.save(ours, tmp_path)
    architecture = transformers.DeepseekV3ForCausalLM
    theirs = architecture.from_pretrained(tmp_path, experts_implementation=implementation)
    built = peers.peer_model("DeepseekV3", implementation, SHAPE)
    assert sizes_of(theirs) == sizes_of(built)
    tokens_BT1 = torch.randint(64, (3, 13), generator=torch.Generator().manual_seed(0))
    our_step = training_step.teacher_step(ours, repeat(tokens_BT1), torch.float32)
    their_step = training_step.peer_step(theirs, repeat(tokens_BT1), torch.float32)
    curves = [[step().item() for _ in range(5)] for step in (our_step, their_step)]
    assert curves[0][-1] < curves[0][0] - 1e-3
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_what_a_gpu_is_measured_at_is_the_scale_for_it():
    from stages.settings import schema as settings  # late: ABSENT
    from stages.settings.compose import compose

    gpu = settings.validate(compose(["scale=gpu"]))
    given = gpu.teacher.model_dump() | {"vocab_size": gpu.prepare.vocab_size, "sequence_tokens": gpu.sequence_tokens}
    fixed = {"gate_mass": 1.0, "mean_experts_per_token": 0.0}  # only a pruned model has others
    assert asdict(training_step.GPU_SCALE).items() <= (given | fixed).items()
    assert training_step.GPU_BATCHES[-1] == gpu.pretrain.batch_sequences


def test_the_mixtral_peer_has_experts_of_our_size():
    pytest.importorskip("transformers")
    ours, theirs = training_step.new_teacher(SHAPE), peers.peer_model("Mixtral", "eager", SHAPE)
    experts = theirs.model.layers[0].mlp.experts
    assert experts.gate_up_proj.shape == ours.blocks[0].mlp.gate_up.shape
    assert experts.down_proj.shape == ours.blocks[0].mlp.down.shape


def test_the_deepseek_and_the_dense_peer_run_as_many_operations_as_we_do_and_mixtral_about_as_many():
    pytest.importorskip("transformers")
    shape = training_step.REFERENCE
    work = [training_step.new_teacher(shape)]
    work += [peers.peer_model(kind, "eager", shape) for kind in ("DeepseekV3", "Qwen3", "Mixtral")]
    ours, deepseek, dense, mixtral = (training_step.forward_flops(model, shape) for model in work)
    assert deepseek == pytest.approx(ours, rel=0.01)
    assert dense == pytest.approx(ours, rel=0.01)
    assert flops_per_token(peers.dense_shape(shape), 256)["total"] == pytest.approx(
        flops_per_token(shape, 256)["total"], rel=0.01
    )
    assert mixtral == pytest.approx(ours, rel=0.15)


@pytest.mark.parametrize("experts", [3, 8])
def test_the_loop_over_experts_gives_the_layers_output_and_gradients(experts):
    layer = moe_layer.new_layer(16, 8, experts, 2)
    torch.nn.init.normal_(layer.bias, std=0.1)
    x_ND = torch.randn(20, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted = (x_ND, layer.router_weight, layer.gate_up, layer.down)
    results = []
    for y_ND in (moe_layer.run_layer(layer, x_ND), moe_layer.loop_over_experts(layer, x_ND)):
        results.append([y_ND, *torch.autograd.grad(y_ND.square().sum(), wanted)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("tokens", [20, 400])  # with 400 an expert's rows are rounded up to blocks
def test_casting_the_experts_weights_beforehand_changes_no_number(tokens):
    layer = moe_layer.new_layer(16, 8, 4, 2)
    cast = moe_layer.with_bfloat16_experts(layer)
    x_ND = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    results = []
    for one in (layer, cast):
        with torch.autocast("cpu", torch.bfloat16):
            y_ND = moe_layer.run_layer(one, x_ND)
        results.append([y_ND, *torch.autograd.grad(y_ND.sum(), (x_ND, one.router_weight, one.gate_up, one.down))])
    assert results[1][3].dtype == torch.bfloat16
    for ours, other in zip(*results, strict=True):
        assert torch.equal(ours, other.to(ours.dtype))


@pytest.mark.parametrize("experts", [3, 8])
def test_transformers_layers_with_our_weights_give_our_layers_output_and_gradients(experts):
    pytest.importorskip("transformers")
    layer = moe_layer.new_layer(16, 8, experts, 2)
    torch.nn.init.normal_(layer.bias, std=0.1)
    x_ND = torch.randn(20, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y_ND = moe_layer.run_layer(layer, x_ND)
    wanted = [y_ND, *torch.autograd.grad(y_ND.square().sum(), (x_ND, layer.router_weight, layer.gate_up, layer.down))]
    found = list(moe_layer.peer_layers(layer, 20, torch.float32))
    assert [name.split()[-1] for name, _ in found] == list(peers.EXPERTS_IMPLEMENTATIONS)
    for _, (theirs, call) in found:
        y_ND = call(x_ND)
        weights = (x_ND, theirs.gate.weight, theirs.experts.gate_up_proj, theirs.experts.down_proj)
        got = [y_ND, *torch.autograd.grad(y_ND.square().sum(), weights)]
        for one, other in zip(wanted, got, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("implementation", peers.EXPERTS_IMPLEMENTATIONS)
@torch.no_grad()
def test_both_caches_and_no_cache_decode_the_same_tokens_however_often(implementation):
    pytest.importorskip("transformers")
    model = training_step.new_teacher(replace(SHAPE, sequence_tokens=32, shared_experts=1)).eval()
    for parameter in model.parameters():
        parameter.mul_(4)  # so that the likeliest token hangs on the text and not on the last token alone
    prompt_BT = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(0))
    ours = partial(decoding.OurText, model, torch.float32, 3, 32)
    theirs = partial(decoding.TheirText, peers.twin(model, implementation))
    without = partial(decoding.OurText, model, torch.float32, 3, 0)
    expected = decoding.reading_again(without, prompt_BT, 12)()
    assert len(expected.unique()) > 3
    for start in (ours, theirs):
        decode = decoding.decoding(start, prompt_BT, 12)
        assert torch.equal(decode(), expected) and torch.equal(decode(), expected)


@torch.no_grad()
def test_casting_the_teachers_weights_beforehand_changes_no_number():
    model = training_step.new_teacher(replace(SHAPE, sequence_tokens=32, shared_experts=1)).eval()
    served = decoding.as_served(model, torch.bfloat16)
    assert model.head.weight.dtype == torch.float32 and served.head.weight.dtype == torch.bfloat16
    tokens_BT = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(0))
    logits = []
    for one in (model, served):
        cache = model.new_cache(3, 10)
        with torch.autocast("cpu", torch.bfloat16):
            logits += [one(tokens_BT, cache), one(tokens_BT[:, :1], cache)]
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[3])


def test_ours_and_nanogpts_batches_hold_neighbouring_tokens_of_the_same_file(tmp_path):
    folder = data.shard_folder(tmp_path / "data", 5000)
    path = data.one_file(folder, tmp_path / "train.bin")
    tokens = Tokens(folder, "train")
    assert path.stat().st_size == 2 * len(tokens) == 10_000
    x_BT, y_BT = data.random_offsets(path, 16, 3)
    assert torch.equal(x_BT[:, 1:], y_BT[:, :-1]) and x_BT.dtype == torch.int64
    assert data.our_batches(Windows(tokens, 16, seed=1), 3)().shape == (3, 17)


def test_the_sorted_router_and_the_one_hot_dispatch_send_the_same_tokens_with_the_same_weights():
    layer = moe_layer.new_layer(16, 8, 6, 3)
    layer.gating = "softmax"
    x_ND = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    gates, order_M, inverse_M, load_1E, loss = router.sorted_routing_in_training(layer, x_ND)
    weight_NK, load_E = gates.weight_NK, load_1E[0]
    plain_weight_NK, rows, plain_loss = router.one_hot_dispatch_in_training(layer, x_ND)
    assert torch.equal(order_M[inverse_M], torch.arange(120))
    assert load_E.tolist() == [len(token) for _, token in rows]
    for expert, sorted_rows in enumerate(order_M.split(load_E.long().tolist())):
        choice, token = rows[expert]
        mine = {(row // 3).item(): weight_NK.flatten()[row].item() for row in sorted_rows}
        theirs = {t.item(): plain_weight_NK[t, c].item() for t, c in zip(token, choice, strict=True)}
        assert mine == pytest.approx(theirs)
    assert loss.item() * 3 == pytest.approx(plain_loss.item())  # Switch's sums over the choices, of which there are 3


def test_the_plain_distillation_loss_gives_the_chunked_loss_and_gradients():
    inputs = losses.some_inputs(tokens=30, vocab=50, student_width=8, teacher_width=12)
    wanted = (inputs.student_x_ND, inputs.student_head_VD)
    results = []
    for loss in (losses.chunked(inputs, chunk_tokens=7), losses.plain(inputs)):
        results.append([loss.detach(), *torch.autograd.grad(loss, wanted)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_peak_memory_counts_what_lives_at_once_and_not_the_inputs():
    inputs = losses.some_inputs(tokens=64, vocab=500, student_width=8, teacher_width=8)

    def two_at_once():
        first = one_hot(inputs.targets_N, 500)  # int64: 256,000 bytes
        second = first + 1
        del first
        return inputs.student_x_ND.sum() + (second[0, 0] * 0)

    peak = losses.peak_bytes(two_at_once, inputs)
    assert 512_000 <= peak < 530_000
    small, large = (losses.peak_bytes(lambda c=c: losses.chunked(inputs, c), inputs) for c in (8, 64))
    assert small < large and small < losses.peak_bytes(lambda: losses.plain(inputs), inputs) / 2
