"""The bench of a hybrid's layers, in small."""

import pytest
from kvp_mlx.bench.layers import hybrid, measure_layers

SMALL = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
DELTA = {f"linear_{name}": 4 for name in ("num_value_heads", "num_key_heads", "conv_kernel_dim")}


def test_a_layer_is_timed_beside_its_floor():
    model = hybrid(5, **SMALL, **DELTA, linear_key_head_dim=16, linear_value_head_dim=16)
    result = measure_layers(model, 40, 2)
    assert (result["layers"], result["prompt_tokens"], len(result["full"]["ms"])) == (5, 40, 2)
    assert result["flops_ratio"] > 1
    assert result["realised"] * result["flops_ratio"] == pytest.approx(result["speedup"])
    assert min(result[part]["share_of_floor"] for part in ("full", "predicted")) > 0
