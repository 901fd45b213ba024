"""The arithmetic of a training run: FLOPs per token, to hold its speed against the machine's matmul rate."""

import math

from ..bundle.loading import KVPModel
from ..models.families import hidden_size, kinds_of, linear_size
from .loop import Trained, TrainOptions
from .teacher import exact_layers


def flops_per_token(model: KVPModel, trained: Trained, options: TrainOptions) -> float:
    """Return the FLOPs of one step over the tokens that it reads.

    Counted: every matmul of the teacher's pass, of the passes on predicted entries and of their gradients
    (to inputs alone where weights are frozen), scores and values over the causal half. Not counted: softmax,
    activations, norms and the optimiser.
    """
    window, base = options.window, model.base
    layers = [2.0 * linear_size(layer) for layer in base.layers]  # FLOPs per token and layer, forward
    pairs = [kind.pair_flops(layer[kind.mixer]) for layer, kind in zip(base.layers, kinds_of(base), strict=True)]
    head = 2.0 * hidden_size(base) * base.args.vocab_size
    maps = 2.0 * sum(block.in_width * block.out_width for block in model.predictor.blocks)
    start = exact_layers(model)

    windows = [getattr(kind, "window", math.inf) for kind in kinds_of(base)]

    def base_pass(tokens: float, entries: float, first: int = 0) -> float:
        return sum(tokens * (layers[i] + pairs[i] * min(entries, windows[i])) for i in range(first, len(layers)))

    total = base_pass(window, window / 2)
    passes = 3 if options.checkpoint else 2  # forward and gradient to the input, and the forward pass once more
    for number in range(options.splits if options.weights.continuation else 0):
        right = options.right if number % 2 == 0 else options.right / 4
        split = (window - right) / 2
        total += passes * base_pass(right, split + right / 2, start) + 3 * right * head + 2 * split * maps
    if options.weights.paper:
        total += 2 * base_pass(window, window / 2, start) + 2 * window * (head + maps)
    if start == 0:
        own_passes = 3 if options.train_auxiliary else 2 if options.lora_rank else 1
        total += own_passes * window * 2.0 * sum(linear_size(layer) for layer in model.auxiliary.layers)
    return total / window
