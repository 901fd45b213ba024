"""What one layer costs: full prefill against prediction, on a hybrid in Qwen3.5-4B's shape, with random weights.

``python -m kvp_mlx.bench.layers`` prints it as JSON; take it on a machine that does nothing else. A layer's shape is
the published one's, the number of layers is not, so that it fits anywhere.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5

from ..arms.work import Work, kv_work, layer_work, predictor_work
from ..bundle.config import AuxiliaryConfig, BaseConfig, BundleConfig, PredictorConfig
from ..bundle.layer_map import prefix_layer_map
from ..bundle.loading import KVPModel, build_predictor
from ..device.machine import copy_bytes_per_s, describe_machine, matmul_flops_per_s
from ..engine.prefill import PrefillTimes, base_prefill, predict_base_cache
from ..models.loading import fit_to_device
from ..models.sections import prefix_model

PREFIX = 1
SHAPE: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "hidden_size": 2560,
    "intermediate_size": 9216,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_value_heads": 32,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "rms_norm_eps": 1e-6,
    "vocab_size": 1024,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}


def hybrid(layers: int, **shape: Any) -> KVPModel:
    """Return a random model of so many layers, with a prefix of one and maps that are not fitted."""
    arguments = qwen3_5.TextModelArgs.from_dict(SHAPE | shape | {"num_hidden_layers": layers})
    base: nn.Module = qwen3_5.TextModel(arguments)
    config = BundleConfig(
        base=BaseConfig(fingerprint="random", path="random"),
        auxiliary=AuxiliaryConfig(kind="prefix", layers=PREFIX),
        predictor=PredictorConfig(input="hidden_state", layer_map=prefix_layer_map(layers, PREFIX)),
    )
    fit_to_device(base)
    prefix = prefix_model(base, PREFIX)
    model = KVPModel(base, prefix, build_predictor(base, prefix, config), None, config, {})
    mx.eval(model.predictor.parameters())
    return model


def measure_layers(model: KVPModel, tokens: int, rounds: int) -> dict[str, Any]:
    """Return the time of a layer in full prefill and in prediction, each with its floor, and the two ratios.

    Args:
        model: of ``hybrid``.
        tokens: of the prompt.
        rounds: of which the medians are taken, after one that warms up.
    """
    depth, rates = len(model.base.layers), (matmul_flops_per_s(mx.float32), copy_bytes_per_s())
    ids = mx.random.randint(0, model.base.args.vocab_size, (1, tokens), key=mx.random.key(0))
    full, predicted = [], []
    for number in range(rounds + 1):
        times = PrefillTimes()
        full_ms = timed(lambda: base_prefill(model, ids))
        predict_base_cache(model, ids, times=times)
        if number:
            full.append(full_ms)
            predicted.append(times.predict_ms)
    whole = sum(
        (layer_work(model.base, n, tokens, 1) for n in range(depth - 1)), kv_work(model.base, depth - 1, tokens, 1)
    )
    rows = {
        "full": row(full, whole, depth - 1, rates),
        "predicted": row(predicted, predictor_work(model, tokens, 1), depth - PREFIX - 1, rates),
    }
    ratio = {key: rows["full"][key] / rows["predicted"][key] for key in ("ms_per_layer", "gflops_per_layer")}
    return {
        "machine": describe_machine() | {"matmul_gflops": rates[0] / 1e9},
        "layers": depth,
        "prompt_tokens": tokens,
        **rows,
        "speedup": ratio["ms_per_layer"],
        "flops_ratio": ratio["gflops_per_layer"],
        "realised": ratio["ms_per_layer"] / ratio["gflops_per_layer"],
    }


def timed(work: Callable[[], Any]) -> float:
    """Return how many milliseconds something takes."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def row(samples: list[float], work: Work, layers: int, rates: tuple[float, float]) -> dict[str, Any]:
    """Return the times of so many layers, of one of them, and their floor."""
    median = statistics.median(samples)
    floor_ms = 1e3 * (work.flops / rates[0] + work.weight_bytes / rates[1])
    return {
        "ms": samples,
        "ms_per_layer": median / layers,
        "gflops_per_layer": work.flops / layers / 1e9,
        "share_of_floor": floor_ms / median,
    }


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("--layers", 8), ("--tokens", 512), ("--rounds", 5)):
        parser.add_argument(name, type=int, default=value)
    given = parser.parse_args()
    sys.stdout.write(json.dumps(measure_layers(hybrid(given.layers), given.tokens, given.rounds), indent=1) + "\n")


if __name__ == "__main__":
    main()
