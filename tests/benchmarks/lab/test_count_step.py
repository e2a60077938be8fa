"""The bytes of a training step add up as lab/count_step.py says: so much a layer, and so much a token of it."""

import pytest
import torch

from lab import count_step

TINY = count_step.SHAPES["tiny"]


def test_bytes_moved_are_inputs_and_results_without_products_and_views():
    x = torch.zeros(3, 4)
    with count_step.BytesMoved() as moved:
        y = (x + 1).T @ x
        y.view(-1).mul_(2)
    assert moved.total == 4 * (12 + 12) + 4 * (16 + 16)


@pytest.mark.slow
def test_other_lengths_and_depths_cost_what_the_counted_ones_say():
    costs = count_step.layer_costs(TINY)
    counted = {layers: count_step.bytes_by_phase(TINY, layers, 48) for layers in (1, 4)}
    for phase, tokens in count_step.tokens_read(48).items():
        predicted = 3 * (costs[phase].fixed + costs[phase].each * tokens)
        assert counted[4][phase] - counted[1][phase] == pytest.approx(predicted, rel=0.01)
        assert costs[phase].each > 0


def test_a_checkpointed_backward_runs_the_forward_again():
    costs = {phase: count_step.Cost(0.0, 1e6) for phase in count_step.PHASES}
    plain = count_step.gigabytes(count_step.Case("1B", 256, 4), costs)
    again = count_step.gigabytes(count_step.Case("1B checkpointed", 256, 4), costs)
    assert again == plain | {"backward": plain["backward"] + plain["packed forward"]}
    assert plain["backward"] == pytest.approx(16 * 4 * 256 * (1 + 2 * 13) / 1e3)
