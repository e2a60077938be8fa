"""Files of results: whole, never of other settings, and done once; and what their means come to."""

from __future__ import annotations

import json
import math
import time

import pytest

from common.deadline import Deadline
from common.results import read_result, result_of
from common.seeds import over_seeds


def test_a_result_is_made_once_and_read_again(tmp_path):
    done = []

    def work():
        done.append(1)
        return {"value": 2.5, "nothing": math.inf}

    path, settings = tmp_path / "a" / "b.json", {"seed": 1, "sizes": (1, 2)}
    assert read_result(path, settings) is None
    first = result_of(path, settings, work)
    assert result_of(path, settings, work) == first == json.loads(path.read_text())
    assert first.keys() == {"settings", "seconds", "versions", "device", "result"}
    assert first["result"] == {"value": 2.5, "nothing": None} and first["settings"] == {"seed": 1, "sizes": [1, 2]}
    assert done == [1] and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 2}, "seed is 2, but .*result.json is the result of seed 1: choose another folder, or remove it"),
        ({"seed": 1, "rows": 3}, "rows is 3, but .*result.json is the result of rows None"),
        ({}, "seed is None, but .*result.json is the result of seed 1"),
    ],
)
def test_a_result_of_other_settings_is_refused(tmp_path, settings, message):
    path = tmp_path / "result.json"
    result_of(path, {"seed": 1}, dict)
    with pytest.raises(ValueError, match=message):
        result_of(path, settings, lambda: pytest.fail("done again"))


def test_work_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError):
        result_of(tmp_path / "result.json", {}, lambda: {"value": 1 / 0})
    assert list(tmp_path.iterdir()) == []


def test_a_time_limit_ends(monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    limit, none = Deadline(120), Deadline(None)
    now += 119
    assert limit.left() == pytest.approx(1) and none.left() == math.inf
    now += 2
    assert limit.left() == pytest.approx(-1) and none.left() == math.inf
    with pytest.raises(ValueError, match="the limit of time is -60 s, but it must be at least 0"):
        Deadline(-60)


def test_an_interval_over_seeds_is_students():
    low, high = over_seeds([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * math.sqrt(2.5) / math.sqrt(5)  # the standard deviation of 1 to 5 is the root of 2.5
    assert (low, high) == pytest.approx((3 - half, 3 + half))
    assert over_seeds([1.0, 2.0, 3.0, 4.0, 5.0], least=2.0, most=4.5) == (2.0, 4.5)
    assert over_seeds([0.5, 0.5]) == (0.5, 0.5)
    assert all(map(math.isnan, over_seeds([0.5])))
    with pytest.raises(ValueError, match="values are 11, but they must be 1 to 10"):
        over_seeds([0.0] * 11)
