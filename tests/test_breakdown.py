"""The time of a forward pass by part adds up to the whole, and the model is left as it was."""

import time

import pytest
import torch
from torch import nn

from stages.measure.breakdown import PARTS, modules_of, seconds_by_part
from stages.model.hub import build_student, build_teacher


@pytest.fixture(params=["teacher", "student"])
def model(request, tiny_settings):
    build = build_teacher if request.param == "teacher" else build_student
    return build(getattr(tiny_settings, request.param), 512, 64, seed=1).eval()


class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.02)
        return x


def test_the_part_that_takes_longer_is_the_one_that_is_named(model):
    tokens = torch.arange(16)[None]
    model.norm = Slow()
    with torch.no_grad():
        found = seconds_by_part(model, lambda: model(tokens), 3)
    assert list(found) == [*PARTS, "rest"] and min(found.values()) > 0
    assert found["norms"] >= 0.02
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_no_part_stands_in_another_and_none_is_left_out(model):
    listed = [module for modules in modules_of(model).values() for module in modules]
    inside = [inner for module in listed for inner in module.modules()]
    assert len(inside) == len(set(inside))
    own = {name for name, _ in model.named_parameters()}
    counted = sum(parameter.numel() for module in listed for parameter in module.parameters())
    assert counted == sum(parameter.numel() for parameter in model.parameters()), own
