"""The tables in circulation: what is recomputed, which cells hold, and that each answer follows from its inputs."""

import datetime
import math

import pytest
import yaml

from stages.files.artifacts import ROOT, Refusal
from stages.planning import circulated, curve_fit
from stages.planning.chips import load_chips
from stages.planning.ownership import load_books, owning

CLAIMS = ROOT / "conf/plan/circulated.yaml"


@pytest.fixture(scope="module")
def told():
    rows, assumed = circulated.load_claims(CLAIMS)
    owned = owning(load_books(ROOT / "conf/plan/ownership.yaml"), assumed.chip, datetime.date(2026, 11, 30), 365)
    return rows, assumed, load_chips()[assumed.chip], owned


@pytest.fixture(scope="module")
def cells(told):
    rows, assumed, chip, owned = told
    found = circulated.recomputed(rows, assumed, chip, owned, ("a run", 0.17))
    return {(cell.table, cell.row, cell.quantity): cell for cell in found}


def test_a_month_of_100_chips_is_ten_times_what_is_told(cells):
    due = {row: cells["month of rent", row, "dollars"] for row in ("specialised", "aws", "azure")}
    assert [cell.recomputed for cell in due.values()] == pytest.approx([360_000, 324_000, 338_400])
    assert not any(cell.holds for cell in due.values())
    assert "10 times too low: it pays 72 hours" in due["aws"].why and "9.79 times" in due["azure"].why


def test_the_wrong_rents_turn_the_choice_around(cells):
    cell = cells["month of owning", "own", "months to break even against specialised"]
    assert cell.claimed == pytest.approx(1e6 / (36_000 - 15_000)) and cell.recomputed < cell.claimed / 5


def test_the_losses_follow_from_their_columns_and_the_efficiencies_from_64_nodes(cells):
    for nodes, loss, aware, generic in ((64, 12, 100, 100), (128, 21, 96, 86), (256, 29, 90, 73), (512, 39, 82, 57)):
        name = f"{nodes} nodes"
        cell = cells["throughput", name, "loss without topology"]
        assert cell.holds and round(100 * cell.recomputed) == loss
        assert round(100 * cells["throughput", name, "efficiency, topology aware"].recomputed) == aware
        assert round(100 * cells["throughput", name, "efficiency, generic"].recomputed) == generic


def test_the_throughput_allows_no_model_of_175b(cells):
    sizes = [cells["throughput", f"{n} nodes", "most active parameters"].recomputed for n in (64, 128, 256, 512)]
    assert sizes[0] == pytest.approx(312e12 * 0.5 / (6 * 1.25e6 / 512)) and max(sizes) < 14e9


def test_the_sums_of_the_year_hold_and_its_owned_column_leaves_the_capital_out(cells):
    table = "year of a 175B model"
    assert all(cells[table, row, "total, million dollars"].holds for row in ("specialised", "generic", "own"))
    with_capital = cells[table, "own", "total with capital, million dollars"]
    assert not with_capital.holds and with_capital.recomputed > with_capital.claimed
    lost = cells[table, "generic", "loss it assumes"].recomputed
    assert lost == pytest.approx(1 - (8.2 / 5.0) / (11.5 / 4.5)), "the two clouds do not buy equal hours"


def test_100_hours_hold_for_one_number_of_chips_only(cells):
    cell = cells["12B on 1 TB", "hours", "chips for 100 hours"]
    assert cell.recomputed == pytest.approx(6 * 12e9 * 1e12 / 4 / (312e12 * 0.5) / 360_000) and cell.holds is None


def test_the_loss_of_leaving_stands_beside_the_worst_that_was_published(cells):
    cell = cells["loss of leaving", "published", "training efficiency lost"]
    assert cell.recomputed == 0.17 and cell.holds is False
    assert cells["loss of leaving", "512 nodes", "training efficiency lost"].holds


def test_the_latency_of_leaving_is_left_open_because_the_claim_names_no_model(cells):
    cell = cells["latency of leaving", "inference", "share added inside a node"]
    assert cell.holds is None and cell.recomputed == 0
    assert "waits 1.8 ms more" in cell.why, "2 all-reduces x 32 layers x 2 hops x 14 microseconds"


def test_a_right_table_is_told_to_hold(told):
    rows = [circulated.MonthOfRent(id="a", chips=2, chip="H100", dollars_per_chip_hour=3.0, dollars=4_320.0)]
    assert circulated.month_of_rent(rows)[0].holds


def test_a_missing_table_or_a_negative_claim_is_one_line(tmp_path):
    content = yaml.safe_load(CLAIMS.read_text())
    file = tmp_path / "circulated.yaml"
    content["duration"][0]["hours"] = -1.0
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(Refusal, match="duration, row 1: hours = -1.0: must be above 0"):
        circulated.load_claims(file)
    del content["duration"]
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(Refusal, match="must have the tables month_of_rent, "):
        circulated.load_claims(file)


# ---- which network gives the curve


def test_the_topology_aware_curve_needs_a_hierarchical_network_and_the_generic_one_a_flat_ring(told):
    rows, assumed, chip, _ = told
    fits = circulated.networks(rows["throughput"], assumed, chip)
    plausible = {name: [(fit.algorithm, fit.fitted) for fit in found if fit.plausible] for name, found in fits.items()}
    assert plausible == {
        "topology_aware": [("hierarchical", "latency_seconds")],
        "generic": [("flat ring", "latency_seconds")],
    }


@pytest.mark.parametrize("algorithm", ["flat ring", "tree", "hierarchical"])
def test_a_curve_made_with_a_latency_gives_that_latency_back(told, algorithm):
    _, assumed, chip, _ = told
    latency, nodes, compute = 20e-6, (8, 32, 128, 512), 5.0
    layer_bytes = assumed.parameters * curve_fit.BYTES_PER_PARAMETER / assumed.layers
    collective = curve_fit.algorithms(chip, 8, layer_bytes)[algorithm]
    reduces = curve_fit.REDUCES_PER_LAYER * assumed.layers
    seconds = [compute + reduces * collective(n, chip.inter_bytes_per_second, latency) for n in nodes]
    speeds = [assumed.tokens_per_chip_step * 8 * n / each for n, each in zip(nodes, seconds, strict=True)]
    fits = curve_fit.explain(nodes, speeds, 8, assumed.tokens_per_chip_step, assumed.parameters, assumed.layers, chip)
    (fit,) = [fit for fit in fits if (fit.algorithm, fit.fitted) == (algorithm, "latency_seconds")]
    assert fit.needed == pytest.approx(latency, rel=1e-4) and fit.compute_seconds == pytest.approx(compute)
    assert fit.error < 1e-9 and fit.plausible


def test_no_network_makes_more_nodes_faster_a_node(told):
    _, assumed, chip, _ = told
    speeds = [1e6, 2.2e6, 5e6]
    fits = curve_fit.explain((64, 128, 256), speeds, 8, 16384, assumed.parameters, assumed.layers, chip)
    assert not any(fit.plausible for fit in fits) and all(math.isfinite(fit.error) for fit in fits)
