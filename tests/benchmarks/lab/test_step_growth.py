"""The command that measures how a step grows: which sizes it gives, and what its table says of what it measured."""

from lab import step_growth


def test_one_size_changes_at_a_time(monkeypatch):
    asked = []

    def in_turn(length, rounds, **changes):
        asked.append((length, rounds, changes))
        return [(3.0, 2.0, 1.0), (5.0, 2.0, 2.0), (4.0, 3.0, 1.0)]

    monkeypatch.setattr(step_growth, "in_turn", in_turn)
    found = [step_growth.measure("rationales", 8, 3), step_growth.measure("positions", 32, 3)]
    usual = dict(rationales=2, thought_tokens=9, ahead_tokens=4)
    assert asked == [(128, 3, usual | dict(rationales=8)), (32, 3, usual)]
    assert found[0]["contenders"]["masked"] == dict(ms=4000.0, times_ours=3.0, least=2.5, most=4.0)
    assert found[0]["contenders"]["ours"] == dict(ms=1000.0, times_ours=1.0, least=1.0, most=1.0)
    assert list(step_growth.lines(found))[2:] == [
        "| r = 8 | 1.00 | 4.00 | 3.00x (2.50, 4.00) | 2.00 | 2.00x (1.00, 3.00) |",
        "| N = 32 | 1.00 | 4.00 | 3.00x (2.50, 4.00) | 2.00 | 2.00x (1.00, 3.00) |",
    ]
