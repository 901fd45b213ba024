"""How much memory a training run will take, estimated before it starts."""

from mlx.utils import tree_flatten

from ..bundle.loading import KVPModel
from ..device.machine import free_bytes
from ..errors import InputError
from ..models.families import hidden_size, targets_of
from .loop import Trained, TrainOptions
from .teacher import CHUNK, exact_layers

FLOAT = 4
OPTIMIZER_COPIES = 5
"""Of every trained parameter: itself, AdamW's two moments, the gradient and the sum that it is added to."""


def require_memory(model: KVPModel, trained: Trained, options: TrainOptions) -> None:
    """Refuse a run that will not fit, before hours are lost to swapping or a kill.

    Raises:
        InputError: the estimate exceeds what is free.
    """
    needed, free = training_bytes(model, trained, options), free_bytes()
    if free is not None and needed > free:
        raise InputError(
            f"training needs about {needed / 2**30:.1f} GiB beside the model, {free / 2**30:.1f} GiB are free; lower "
            "--window, --right or --batch-size, or add --checkpoint."
        )


def training_bytes(model: KVPModel, trained: Trained, options: TrainOptions) -> int:
    """Estimate the bytes that training holds at its peak, beside the weights that are loaded already.

    Counted are the trained parameters with their optimiser state, what the teacher keeps of a batch, and the larger
    of a continuation's and an all-predicted pass's activations; the tests compare it with MLX's own peak.
    """
    parameters = sum(array.size for _, array in tree_flatten(trained.trainable_parameters()))
    depth, exact = len(model.base.layers), exact_layers(model)
    tokens = options.batch_size * options.window
    kv_width = sum(target.width for targets in targets_of(model.base) for target in targets)
    kept = tokens * (2 * kv_width + (depth - exact + 3) * hidden_size(model.base))
    rows = options.batch_size * max(options.right if options.weights.continuation else 0, _rows_alone(options))
    pass_floats = rows * (1 if options.checkpoint else depth - exact) * _layer_floats(model, options.window)
    if "auxiliary" in trained:
        pass_floats += tokens * len(model.auxiliary.layers) * _layer_floats(model, options.window)
    predicted = 3 * tokens * kv_width
    vocabulary = 8 * rows * model.base.args.vocab_size
    chunk = 2 * options.batch_size * min(CHUNK, options.window) * _layer_floats(model, options.window)
    return FLOAT * (OPTIMIZER_COPIES * parameters + kept + max(pass_floats + predicted + vocabulary, chunk))


def _rows_alone(options: TrainOptions) -> int:
    return options.window if options.weights.paper else 0


def _layer_floats(model: KVPModel, entries: int) -> int:
    """Floats that one token leaves in one layer for the backward pass: scores, FFN, and the residual's copies."""
    hidden = hidden_size(model.base)
    heads = getattr(model.base.args, "num_attention_heads", None) or max(model.base.args.num_query_heads)
    ffn = getattr(model.base.args, "intermediate_size", None) or 4 * hidden
    return 3 * heads * entries + 4 * ffn + 8 * hidden
