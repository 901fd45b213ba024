"""What training minimises, in plain NumPy and float64 on the oracle's models; shares no code with kvp_mlx.

Written from method.md section 2 and design.md section 1. ``ids`` is one document (1, T) without padding.
"""

import numpy as np

from .oracle import KVPrediction, Llama, Pass, Transformer, split_heads


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def divergence(true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """KL(true, predicted) of logits (..., vocabulary), in nats."""
    true, predicted = log_softmax(true), log_softmax(predicted)
    return (np.exp(true) * (true - predicted)).sum(axis=-1)


def cross_entropy(logits: np.ndarray, ids: np.ndarray, z: float = 0.0) -> float:
    """Mean over all tokens but the first, plus ``z`` times the mean squared log-partition."""
    logits, targets = logits[:, :-1], ids[:, 1:, None]
    losses = -np.take_along_axis(log_softmax(logits), targets, axis=-1)[..., 0]
    partition = np.log(np.exp(logits).sum(axis=-1))
    return float((losses + z * partition**2).mean())


def continuation(oracle: KVPrediction, ids: np.ndarray, split: int, end: int) -> tuple[float, float]:
    """KL and residual error on tokens ``split`` to ``end - 1``, which the base reads on the predicted cache."""
    student, true = _student_and_true(oracle, ids, split, end)
    kl = divergence(true.logits[:, split:end], student.logits).mean()
    exact = exact_layers(oracle)
    errors = []
    origin = true.streams[exact][:, split:end] if exact else 0.0
    for layer in range(exact + 1, oracle.base.depth):
        target = true.streams[layer][:, split:end]
        distance = np.square(student.streams[layer] - target).sum(axis=-1)
        errors.append((distance / (np.square(target - origin).sum(axis=-1) + 1e-6)).mean())
    return float(kl), float(np.mean(errors)) if errors else 0.0


def _student_and_true(oracle: KVPrediction, ids: np.ndarray, split: int, end: int) -> tuple[Pass, Pass]:
    cache, _ = oracle.prefill(ids[:, :split])
    return oracle.base.forward(ids[:, split:end], cache), oracle.base.forward(ids[:, :end])


def base(oracle: KVPrediction, ids: np.ndarray, z: float = 0.0) -> float:
    """Cross-entropy of the base whose token t attends to the predicted entries of 0 to t and to no others."""
    predicted, _ = oracle.prefill(ids)
    return cross_entropy(oracle.base.forward(ids, only=predicted).logits, ids, z)


def auxiliary(oracle: KVPrediction, ids: np.ndarray, z: float = 0.0) -> float:
    return cross_entropy(oracle.auxiliary.forward(ids).logits, ids, z)


def consistency(oracle: KVPrediction, ids: np.ndarray) -> float:
    """L1 per layer, keys after k_norm and before RoPE, values raw; summed over layers, keys and values."""
    read = oracle.auxiliary.forward(ids).readings
    true = oracle.base.forward(ids).readings
    total = 0.0
    for layer, sources in enumerate(oracle.layer_map):
        if sources is None:
            continue
        for kind in ("keys", "values"):
            pair = oracle.mapped(layer, kind, read), getattr(true[layer], kind)
            if kind == "keys":
                pair = tuple(_normed(oracle.base, layer, keys) for keys in pair)
            total += np.abs(pair[0] - pair[1]).mean()
    return float(total)


def _normed(model: Transformer, layer: int, keys: np.ndarray) -> np.ndarray:
    return model.head_norm(layer, "k_norm", split_heads(keys, model.kv_heads(layer)))


def exact_layers(oracle: KVPrediction) -> int:
    """The prefix's layers, whose entries need no prediction; none if it reads with weights of its own."""
    return list(oracle.layer_map).count(None) if oracle.is_prefix else 0


def with_updates(oracle: KVPrediction, updates: dict[str, np.ndarray], scale: float) -> KVPrediction:
    """Return the oracle of a Llama prefix that reads with low-rank updates, lora_a (in, r) and lora_b (r, out)."""
    weights = dict(oracle.base.weights)
    for owner in {name.rpartition(".")[0] for name in updates}:
        down, up = (updates[f"{owner}.{part}"].astype(np.float64) for part in ("lora_a", "lora_b"))
        weights[f"{owner}.weight"] = weights[f"{owner}.weight"] + scale * (down @ up).T
    reader = Llama(oracle.base.config, weights)
    return KVPrediction(oracle.base, reader, oracle.layer_map, oracle.reads, oracle.maps, oracle.preceding)
