"""The sections `teacher` and `student`: shapes of new models, a teacher that is there, a student cut out of it."""

from typing import Any, Literal

from stages.settings.bounds import (
    Blank,
    Count,
    Keep,
    Natural,
    Positive,
    RotaryBase,
    RotaryWidth,
    Section,
    Share,
    Word,
)
from stages.settings.reading import refuse

TEACHER_FOLDER = ("teacher.source", "teacher.path", "teacher.end_of_text", "teacher.trim_vocabulary")


class Teacher(Section):
    source: Literal["train", "folder"]
    path: Word | None  # of a Hugging Face folder
    end_of_text: Blank | None  # the token of its tokenizer that ends a document; None: found by its name
    trim_vocabulary: bool  # to the tokens that the corpus is made of
    layers: Count  # from here on: of the one that is trained here
    dense_layers: Natural
    width: Count
    heads: Count
    nope_head_dim: Count
    rope_head_dim: RotaryWidth
    value_head_dim: Count
    latent_width: Count
    dense_width: Count
    experts: Count
    experts_per_token: Count
    shared_experts: Natural
    expert_width: Count
    gating: Literal["sigmoid", "softmax"]
    route_scale: Positive
    bias_update_rate: Share
    balance_loss_weight: Share
    rope_theta: RotaryBase


class Student(Section):
    parameters_share: Keep  # with distill.init: pruned, of the teacher's parameters; the shape below is not read then
    keep_layers: Keep
    keep_heads: Keep
    layers: Count
    width: Count
    heads: Count
    kv_heads: Count
    head_dim: RotaryWidth
    mlp_width: Count
    rope_theta: RotaryBase


def teacher_rules(settings: Any) -> None:
    teacher = settings.teacher
    if teacher.source == "folder" and teacher.path is None:
        rule = "must name the folder of a model when teacher.source is folder: teacher: {source: folder, path: ...}"
        refuse("teacher.path", None, rule)
    for key in ("path", "end_of_text", "trim_vocabulary"):
        if teacher.source == "train" and (value := getattr(teacher, key)) not in (None, False):
            rule = "only source folder reads it, and teacher.source is train: choose teacher=folder"
            refuse(f"teacher.{key}", value, rule)


def pretrain_rules(settings: Any) -> None:
    if settings.teacher.source == "train" and settings.pretrain.steps == 0:
        refuse("pretrain.steps", 0, "must be at least 1: only a teacher from a folder needs no training")


def distill_rules(settings: Any) -> None:
    if settings.teacher.source == "train" and settings.distill.init == "pruned":
        rule = "cuts a dense teacher from a folder (teacher=folder); the one trained here is a mixture: set teacher"
        refuse("distill.init", "pruned", rule)
