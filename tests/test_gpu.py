"""What runs on CUDA alone: grouped products, compiled blocks, fused losses. Without a GPU: that they trace, and that
the formulas given to the compiler are those of the slow twins. Needs no package beyond torch and pytest's.
"""

import contextlib
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.moe_layer import ScatterMoE, new_layer, run_layer
from benchmarks.training_step import REFERENCE, batches, new_teacher, teacher_step
from stages.model import experts, layers, losses
from stages.model.divergences import DIVERGENCES, forward_kl
from stages.model.experts import MoE
from stages.model.families.deepseek_v3 import model as teacher
from stages.model.families.deepseek_v3.model import DeepseekV3 as Teacher
from stages.model.families.qwen3 import model as student
from stages.model.families.qwen3.model import Qwen3 as Student
from stages.model.families.qwen3.model import Qwen3Shape as StudentShape
from stages.model.generation import Reader
from stages.model.kernels.experts import routed_experts
from stages.model.layers import initialise
from stages.training.fit import NextToken, compile_blocks, settle_cublas_workspaces

SHAPE = replace(
    REFERENCE, vocab_size=512, sequence_tokens=64, layers=3, dense_layers=1, width=64, heads=4, dense_width=128,
    expert_width=32, shared_experts=1,
)  # fmt: skip
STUDENT = StudentShape(
    vocab_size=512, sequence_tokens=64, layers=2, width=64, heads=4, kv_heads=2, head_dim=16, mlp_width=128,
    rope_theta=10000.0,
)  # fmt: skip

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not layers.has_bfloat16("cuda"), reason="no GPU with bfloat16"
)


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return ((one - other).norm() / other.norm()).item()


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    """Tensors without storage take every path that is not for the CPU. They know no autocast: weights are cast here."""
    linear = F.linear
    for module in (layers, experts, teacher, student, losses):
        monkeypatch.setattr(module, "for_matmuls", lambda x: x.bfloat16(), raising=False)
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: linear(x.bfloat16(), weight.bfloat16()))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(experts, "routed_experts", routed_experts["sorted_grouped"])
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("kind", "shape"), [(Teacher, SHAPE), (Student, STUDENT)])
def test_a_block_is_one_graph_forward_and_backward(as_if_on_a_gpu, kind, shape):
    with torch.device("meta"):
        model, tokens_BT1 = kind(shape).bfloat16(), torch.zeros(4, 65, dtype=torch.long)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    NextToken(1e-4)(model, tokens_BT1).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_the_formulas_for_the_compiler_give_the_gradients_of_the_chunked_loss():
    torch.manual_seed(0)
    z_CV, teacher_z_CV, target_C = torch.randn(7, 50) * 3, torch.randn(7, 50) * 3, torch.randint(50, (7,))
    eye = torch.eye(50)  # logits are products with a head
    slow_CV, hard = losses._hard_gradient(z_CV, eye, target_C)
    dz_CV, hard_C, soft_C = losses.gradients(z_CV, target_C, None, 1.0, 0.0)
    torch.testing.assert_close(dz_CV, slow_CV)
    torch.testing.assert_close(hard_C.sum(), hard)
    assert not soft_C.any()

    chunk = losses.Chunk(z_CV, eye, target_C, teacher_z_CV, eye)
    slow_CV, hard, soft = losses.by_autograd(chunk, losses.DistillationLoss(forward_kl, 2.0, 0.7, 7))
    dz_CV, hard_C, soft_C = losses.gradients(z_CV, target_C, teacher_z_CV, 2.0, 0.7)
    torch.testing.assert_close(dz_CV, slow_CV, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(hard_C.sum(), hard)
    torch.testing.assert_close(soft_C.sum(), soft)


def test_compiling_takes_triton_and_a_c_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert not layers.can_compile()
    (tmp_path / "gcc").touch(mode=0o755)
    assert layers.can_compile()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not layers.can_compile()


@on_gpu
@pytest.mark.parametrize("gating", ["sigmoid", "softmax"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_layer_on_a_gpu_gives_the_output_and_gradients_of_the_slow_one(gating, compiled):
    slow = MoE(64, 32, 8, 3, 1, gating, 1.0)
    initialise(slow, 1, seed=0)
    torch.nn.init.normal_(slow.bias, std=0.01)
    fast = MoE(64, 32, 8, 3, 1, gating, 1.0).cuda()
    fast.load_state_dict(slow.state_dict())
    if compiled:
        fast.compile(fullgraph=True)
    x_BTD, grad_BTD = torch.randn(4, 100, 64), torch.randn(4, 100, 64)
    results = []
    for layer in (slow, fast):
        device = layer.down.device
        x = x_BTD.clone().to(device).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            y_BTD, routing = layer(x)
        (y_BTD.float() * grad_BTD.to(device)).sum().add(routing.balance_loss).backward()
        results.append([y_BTD, routing.load_E, routing.balance_loss, x.grad, *(p.grad for p in layer.parameters())])
    assert results[1][1].tolist() == results[0][1].tolist()
    assert max(far(fast, slow) for slow, fast in zip(*results, strict=True)) < 0.02


@on_gpu
@pytest.mark.parametrize("word", [None, *DIVERGENCES])
def test_the_loss_on_a_gpu_is_that_of_the_slow_one(word):
    torch.manual_seed(0)
    targets_N = torch.randint(1000, (300,))
    x_ND, head_VD = torch.randn(300, 64), torch.randn(1000, 64) * 0.1
    teacher_x_ND, teacher_head_VD = torch.randn(300, 96), torch.randn(1000, 96) * 0.1
    results = []
    for device in ("cpu", "cuda"):
        x, head = (part.clone().to(device).requires_grad_() for part in (x_ND, head_VD))
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            if word:
                fixed = (part.to(device) for part in (teacher_x_ND, teacher_head_VD, targets_N))
                loss, _ = losses.DistillationLoss(DIVERGENCES[word], 2.0, 0.7, 128)(x, head, *fixed)
            else:
                loss = losses.next_token(x, head, targets_N.to(device), chunk_tokens=128)
        loss.backward()
        results.append([loss, x.grad, head.grad])
    assert max(far(fast, slow) for slow, fast in zip(*results, strict=True)) < 0.02


def losses_of_steps(compiled: bool, steps: int = 6) -> list[float]:
    torch.compiler.reset()
    model = new_teacher(SHAPE)
    step = teacher_step(model, batches(SHAPE, 4), torch.bfloat16)
    if not compiled:
        for block in model.blocks:
            block._compiled_call_impl = None
    return [step().item() for _ in range(steps)]


@on_gpu
@pytest.mark.parametrize(("kind", "shape"), [(Teacher, SHAPE), (Student, STUDENT)])
def test_every_weight_of_a_compiled_model_has_the_gradient_that_it_has_uncompiled(kind, shape):
    torch.compiler.reset()
    gradients = []
    for compiled in (False, True):
        model = kind(shape).cuda()
        initialise(model, shape.layers, seed=0)
        if compiled:
            compile_blocks(model)
        with torch.autocast("cuda", torch.bfloat16):
            loss = NextToken(1e-4)(model, next(batches(shape, 4))).loss
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert max(far(fast, slow) for slow, fast in zip(*gradients, strict=True)) < 0.05


@on_gpu
def test_compiled_blocks_learn_as_others_do():
    assert losses_of_steps(compiled=True) == pytest.approx(losses_of_steps(compiled=False), rel=2e-3)


@on_gpu
def test_deterministic_steps_repeat_bit_for_bit_once_the_workspaces_are_settled(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch._inductor.config, "deterministic", True)
    settle_cublas_workspaces()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    torch.use_deterministic_algorithms(True)
    try:
        assert losses_of_steps(compiled=True) == losses_of_steps(compiled=True)
    finally:
        torch.use_deterministic_algorithms(False)


@on_gpu
def test_compiling_leaves_names_and_a_move_to_the_cpu_alone():
    model = new_teacher(SHAPE)
    names = list(model.state_dict())
    compile_blocks(model)
    model(torch.zeros(2, 64, dtype=torch.long, device="cuda"))
    assert list(model.cpu().state_dict()) == names


@on_gpu
@torch.no_grad()
@pytest.mark.parametrize(("kind", "shape"), [(Teacher, SHAPE), (Student, STUDENT)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_graph_reads_token_by_token_what_the_whole_forward_reads(kind, shape, dtype, deterministic, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model = kind(shape).cuda().eval()
    initialise(model, shape.layers, seed=0)
    tokens_BT = torch.randint(shape.vocab_size, (2, 12), device="cuda")
    torch.use_deterministic_algorithms(deterministic)
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            whole_BTV, reader = model(tokens_BT), Reader(model, 2, 12)
            read = [reader.read(part_BT) for part_BT in tokens_BT.split([5, *[1] * 7], dim=1)]
            with pytest.raises(ValueError, match="holds 12 tokens; 13 were fed"):
                reader.read(tokens_BT[:, :1])
            reader.forget(7)
            read.append(reader.read(tokens_BT[:, 5:6]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert reader.graph is not None
    assert far(torch.stack(read[:-1], dim=1), whole_BTV[:, 4:]) < (2e-2 if dtype == torch.bfloat16 else 1e-4)
    assert torch.equal(read[-1], read[1])


@on_gpu
def test_scattermoes_experts_give_what_ours_give_behind_the_same_router():
    pytest.importorskip("scattermoe")
    layer = new_layer(64, 32, 8, 3)
    x_ND, theirs = torch.randn(300, 64, device="cuda"), ScatterMoE(layer, torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        ours_ND = run_layer(layer, x_ND)
        theirs_ND = theirs(x_ND)
    assert far(theirs_ND, ours_ND) < 0.02
