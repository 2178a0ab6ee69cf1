"""Rows of published points: the registry is whole, new rows are data only, bad ones are refused in one line."""

from pathlib import Path

import pytest
import yaml

from stages.files.artifacts import Refusal
from stages.planning.chips import Chip, load_chips
from stages.planning.ledgers import row_of
from stages.planning.points import load_models, load_points

GOOD = {
    "id": "a",
    "set": "mine",
    "publisher": "me",
    "model": "Llama-3.1-8B",
    "chip": "H100",
    "chips": 64,
    "nodes": 8,
    "precision": "bf16",
    "layout": {"tp": 1, "pp": 1, "dp": 64, "zero": 3},
    "global_batch_sequences": 128,
    "micro_batch_sequences": 2,
    "sequence_tokens": 8192,
    "metric": "tokens_per_second_per_chip",
    "value": 6600,
    "source": "my notes",
}


def written(folder: Path, *rows) -> Path:
    path = folder / "points.yaml"
    path.write_text(yaml.safe_dump(list(rows)))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(Refusal) as caught:
        load_points(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message.removeprefix(f"{path}: ")


def test_the_registry_has_what_was_asked_for():
    points = load_points()
    assert len(points) >= 60
    assert len({point.publisher for point in points}) >= 6
    sets = {point.set for point in points}
    assert {f"S{number}" for number in (*range(1, 13), *range(14, 25), 26)} <= sets
    assert {"FF", "TT-8B", "LF", "MS"} <= sets
    assert all(point.source for point in points)


def test_every_chip_and_model_has_a_source():
    assert all(chip.source for chip in load_chips().values())
    assert all(model.source for model in load_models().values())


def test_a_latency_or_a_link_without_a_source_is_marked():
    chips = load_chips()
    for chip in chips.values():
        for link in ("intra", "inter"):
            assert getattr(chip, f"{link}_latency_seconds") or f"{link}_latency_seconds" in chip.assumed, chip.name
    amd = [chip for name, chip in chips.items() if name.startswith("MI")]
    assert all("inter_latency_seconds" in chip.assumed for chip in amd)


def test_only_a_field_of_the_row_can_be_assumed():
    values = load_chips()["H100"].model_dump() | {"assumed": ["memory"]}
    with pytest.raises(Refusal, match="chip: assumed: memory is no field of the row; name a field"):
        row_of(Chip, values, "chip")


def test_the_parameters_of_scaled_models_follow_from_their_shapes():
    """MaxText doubles heads and MLP, width and layers in turn from 16 heads of 128, 7,168, 2,048 and 16."""
    for name, model in load_models().items():
        if not name.startswith("MaxText-"):
            continue
        cycles, rest = divmod(int(name.removeprefix("MaxText-").removesuffix("B")).bit_length() - 1, 3)
        heads_and_mlp, width, layers = 2 ** (cycles + (rest > 0)), 2048 * 2 ** (cycles + (rest > 1)), 16 * 2**cycles
        assert (model.width, model.layers) == (width, layers), name
        block = heads_and_mlp * width * (4 * 16 * 128 + 3 * 7168)
        assert layers * block + 2 * 32000 * width == pytest.approx(model.total_parameters, rel=0.03), name


def test_published_steps_and_rates_are_turned_into_each_other_exactly():
    points = [point for point in load_points() if not point.missing and point.metric != "efficiency_percent"]
    assert len(points) > 60
    for point in points:
        seconds = point.step_seconds()
        assert point.value_at(seconds) == pytest.approx(point.value)
    by_id = {point.id: point for point in points}
    seconds = by_id["LF-70B-512"].step_seconds()
    assert 4096 * 2048 / seconds == pytest.approx(515636, rel=1e-3)  # the table's own total of tokens per second


def test_a_row_of_an_unseen_model_with_null_fields_is_read_and_says_what_it_lacks(tmp_path):
    model = {"name": "Unseen", "total_parameters": 9e9, "active_parameters": None}
    row = GOOD | {"model": model, "layout": None, "date": None, "stack": None, "micro_batch_sequences": None}
    (point,) = load_points(written(tmp_path, row))
    assert point.missing == ["model.active_parameters", "layout"]


def test_links_of_a_row_replace_the_chips_own(tmp_path):
    (point,) = load_points(written(tmp_path, GOOD | {"links": {"inter_bytes_per_second": 1e9}}))
    assert point.chip.inter_bytes_per_second == 1e9
    assert point.chip.intra_bytes_per_second == load_chips()["H100"].intra_bytes_per_second


def test_an_anchor_may_be_a_row_of_the_registry(tmp_path):
    (point,) = load_points(written(tmp_path, GOOD | {"anchor": "TT-8B-8"}))
    assert point.anchor == "TT-8B-8"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chip": "H1000"}, "row a: chip = H1000: not in conf/plan/chips.yaml; did you mean H100?"),
        ({"model": "Lama-3.1-8B"}, "row a: model = Lama-3.1-8B: not in conf/plan/models.yaml"),
        ({"layout": {"tp": 1, "pp": 1, "dp": 32}}, "row a: layout: tp 1 x pp 1 x cp 1 x dp 32 makes 32 ranks on 64"),
        ({"layout": {"tp": 3}}, "row a: layout: tp 3"),
        ({"layout": {"tp": 1, "ep": 7}}, "row a: layout: ep 7 x etp 1 does not divide the 64 chips"),
        ({"layout": {"tq": 1}}, "row a: layout.tq: no such field; there are tp, pp,"),
        ({"layout": "tensor"}, "row a: layout = tensor"),
        ({"nodes": 0}, "row a: nodes = 0: must be at least 1"),
        ({"nodes": 4}, "row a: chips = 64: 4 nodes of 8 have 32"),
        ({"chips": -64}, "row a: chips = -64: must be at least 1"),
        ({"chips": "sixty"}, "row a: chips = sixty: must be a whole number"),
        ({"chips": True}, "row a: chips = True: must be a whole number"),
        ({"value": -1.0}, "row a: value = -1.0: must be at least 1e-18"),
        ({"value": float("nan")}, "row a: value = nan: must be a finite number"),
        ({"global_batch_sequences": 100}, "row a: global_batch_sequences = 100: must be a multiple of dp"),
        ({"metric": "speed"}, "row a: metric = speed: must be step_seconds, "),
        ({"precision": "fp4"}, "row a: precision = fp4: H100 has a peak for bf16"),
        ({"links": {"inter_bytes_per_second": -3.0}}, "row a: links: inter_bytes_per_second = -3.0: must be above 0"),
        ({"anchor": "b"}, "row a: anchor = b: no row has this id"),
        ({"anchor": "a"}, "row a: anchor: circular (a -> a)"),
        ({"date": "2025"}, "row a: date = 2025: must be a date such as 2025-01-31"),
        ({"gpus": 64}, "row a: gpus: no such field"),
        (
            {"model": {"name": "M", "total_parameters": 1e9, "active_parameters": 2e9}},
            "row a: model: active_parameters",
        ),
        (
            {
                "model": {
                    "name": "M",
                    "total_parameters": 1e9,
                    "active_parameters": 1e8,
                    "experts": 8,
                    "experts_per_token": 2,
                }
            },
            "row a: model: active_parameters = 1e+08: a token passes through 2 of 8 experts, so at least through that",
        ),
        ({"source": None}, "row a: source = None: must be a word"),
    ],
)
def test_a_bad_row_is_refused_in_one_line_that_names_it(tmp_path, change, says):
    assert refusal(written(tmp_path, GOOD | change)).startswith(says)


def test_a_missing_field_a_double_id_and_a_circle_are_refused(tmp_path):
    assert refusal(written(tmp_path, {"id": "a"})) == "row a: set: missing; write it"
    assert refusal(written(tmp_path, GOOD, GOOD)).startswith("row a: the id stands in")
    circle = [GOOD | {"id": one, "anchor": two} for one, two in ("ab", "bc", "ca")]
    assert refusal(written(tmp_path, *circle)).startswith("row a: anchor: circular (a -> b -> c -> a)")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"- {id: a, [", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"- {id: a}\n- {id: b, date: 2025-02-31}", ", line 2: not YAML (2025-02-31: day is out of range"),
        (b"- {id: a, id: b}", "the key id stands twice"),
        (b"", "must be a list of rows"),
        (b"points: 3", "must be a list of rows"),
        (b"- hello", "row 1: hello: must be a mapping of fields"),
    ],
)
def test_a_file_that_is_no_list_of_rows_is_refused_in_one_line(tmp_path, content, says):
    path = tmp_path / "points.yaml"
    path.write_bytes(content)
    with pytest.raises(Refusal) as caught:
        load_points(path)
    assert says in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_and_a_folder_without_rows_are_refused(tmp_path):
    assert "there is no such file" in refusal(tmp_path / "none.yaml")
    with pytest.raises(Refusal, match="has no file with rows"):
        load_points(tmp_path)


def test_numbers_may_be_written_as_people_write_them(tmp_path):
    path = tmp_path / "points.yaml"
    path.write_text(written(tmp_path, GOOD).read_text().replace("value: 6600", "value: 6.6e3"))
    assert load_points(path)[0].value == 6600


def test_a_chip_says_which_precisions_it_knows():
    chip = load_chips()["TPU-v5e"]
    assert chip.peak("bf16") == 197e12
    with pytest.raises(Refusal, match="no peak for precision fp8; there are bf16, int8"):
        chip.peak("fp8")
    with pytest.raises(Refusal, match="x: memory_bytes = -1: must be above 0"):
        row_of(Chip, chip.model_dump() | {"memory_bytes": -1}, "x")
