import pytest

pytest.importorskip("pandas", reason="vim2.forecast needs pandas")

import numpy as np
import pandas as pd
from forecast_helpers import shared_data

from vim2.forecast.wrmsse import M5_LEVELS, aggregate_m5, wrmsse


@pytest.fixture(scope="module")
def m5():
    """Ids in the order of the published bottom series; truth, scales and weights of all 42,840 series."""
    ids = pd.read_csv(shared_data("m5/sales_ids.csv.gz")).sort_values(["item_id", "store_id"], ignore_index=True)
    truth = pd.read_csv(shared_data("m5/test_agg.csv.gz")).to_numpy(float)
    scales, weights = (
        pd.read_csv(shared_data(f"m5/{n}.csv.gz")).iloc[:, 0].to_numpy() for n in ("train_mse", "weights")
    )
    return ids, truth, scales, weights


def test_a_small_hierarchy_by_hand():
    ids = pd.DataFrame(
        [("a", "d", "c", s, "CA" if s < "s3" else "TX") for s in ("s1", "s2", "s3")],
        columns=["item_id", "dept_id", "cat_id", "store_id", "state_id"],
    )
    sums = aggregate_m5(np.array([[1.0], [2.0], [4.0]]), ids)[:, 0]
    states, stores = [3, 4], [1, 2, 4]
    of_state = [*states, *states]  # by category and by department
    of_store = [*stores, *stores]
    assert sums.tolist() == [7, *states, *stores, 7, 7, *of_state, *of_store, 7, *states, *stores]


def test_the_measure_by_hand():
    truth, forecast = np.array([[2.0, 4.0], [0.0, 0.0]]), np.array([[2.0, 2.0], [3.0, 3.0]])
    assert wrmsse(forecast, truth, [4.0, 9.0], [0.75, 0.25]) == pytest.approx(0.75 * np.sqrt(2 / 4) + 0.25)
    with pytest.raises(ValueError, match="sum to 1"):
        wrmsse(forecast, truth, [4.0, 9.0], [0.75, 0.75])
    with pytest.raises(ValueError, match="no positive scale"):
        wrmsse(forecast, truth, [0.0, 9.0], [0.75, 0.25])
    with pytest.raises(ValueError, match="must be"):
        wrmsse(forecast, truth[:, :1], [4.0, 9.0], [0.75, 0.25])
    with pytest.raises(ValueError, match="2 rows, ids 1"):
        aggregate_m5(truth, pd.DataFrame({"item_id": ["a"]}))


def test_published_sales_and_weights_add_up_over_the_twelve_levels(m5):
    ids, truth, _, weights = m5
    np.testing.assert_array_equal(aggregate_m5(truth[-len(ids) :], ids), truth)
    # dollar sales add up as well, so that the weights of a level are sums of the bottom level's
    np.testing.assert_allclose(aggregate_m5(weights[-len(ids) :, None], ids)[:, 0], weights, rtol=1e-9, atol=1e-15)
    assert weights.sum() == pytest.approx(1) and len(M5_LEVELS) == 12


def test_naive_forecasts_of_the_published_sales(m5):
    """From the first week of the 28 days, the only history at hand, for the three that follow."""
    ids, truth, scales, weights = m5
    bottom = truth[-len(ids) :]
    naive = aggregate_m5(np.repeat(bottom[:, 6:7], 21, axis=1), ids)
    weekly = aggregate_m5(np.tile(bottom[:, :7], 3), ids)
    naive_error, weekly_error = (wrmsse(f, truth[:, 7:], scales, weights) for f in (naive, weekly))
    by_hand = sum(
        w * (sum((a - b) ** 2 for a, b in zip(f, y)) / 21 / s) ** 0.5
        for f, y, s, w in zip(naive.tolist(), truth[:, 7:].tolist(), scales.tolist(), weights.tolist())
    )
    assert naive_error == pytest.approx(by_hand, rel=1e-9)
    assert (round(naive_error, 4), round(weekly_error, 4)) == (1.5793, 0.9404)
    assert wrmsse(truth, truth, scales, weights) == 0
