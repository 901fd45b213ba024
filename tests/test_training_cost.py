"""The arithmetic of training, written out by hand for one tiny model."""

from support.tiny import llama, prefixed

from kvp_mlx.train.cost import flops_per_token
from kvp_mlx.train.loop import Trained, TrainOptions

LAYER = 2 * (64 * 64 + 2 * 64 * 16 + 64 * 64 + 3 * 64 * 96)  # q, k and v, o, FFN
SCORES = 4 * 64 * 32  # half of a window of 64, and what a right part sees on average
HEAD = 2 * 64 * 97
MAPS = 2 * 64 * (2 * 2 * 16)  # two predicted layers


def test_flops_of_a_prefix() -> None:
    model = prefixed(llama(), 1)[0]
    options = TrainOptions(window=64, splits=2, right=16)
    teacher = 64 * 4 * (LAYER + SCORES)
    splits = (2 * 20 * 2 * (LAYER + SCORES)) + 3 * 20 * HEAD + 2 * (24 + 30) * MAPS
    assert flops_per_token(model, Trained(model, options), options) == (teacher + splits) / 64


def test_checkpointing_runs_the_predicted_layers_once_more() -> None:
    model = prefixed(llama(), 1)[0]
    plain, again = (TrainOptions(window=64, splits=1, right=16, checkpoint=value) for value in (False, True))
    extra = 16 * 2 * (LAYER + SCORES) / 64
    trained = Trained(model, plain)
    assert flops_per_token(model, trained, again) - flops_per_token(model, trained, plain) == extra
