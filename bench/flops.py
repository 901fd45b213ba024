"""The published pairs' arithmetic, without a run: the paper's ratio, and the true one at a given prompt."""

from typing import Any

from ..arms.work import full_work, kvp_work, parameters_of, predictor_work, prefill_work, step_work
from ..bundle.config import BundleConfig
from ..bundle.loading import KVPModel, build_predictor
from ..bundle.presets import PRESETS, preset_parts

PAPER_RATIOS = {  # arXiv 2410.08391, the FLOPs columns of its tables: parameters of the base over the auxiliary's
    "openelm-1_1b-kvp-c-450m": 2.36,
    "openelm-1_1b-kvp-c-270m": 3.98,
    "openelm-1_1b-kvp-lp-0_75": 1.34,
    "openelm-1_1b-kvp-lp-0_50": 1.93,
    "openelm-1_1b-kvp-lp-0_25": 3.60,
    "openelm-3b-kvp-c-1_1b": 2.81,
    "openelm-3b-kvp-c-450m": 6.64,
    "openelm-3b-kvp-c-270m": 11.18,
    "openelm-3b-kvp-lp-0_75": 1.34,
    "openelm-3b-kvp-lp-0_50": 1.97,
    "openelm-3b-kvp-lp-0_25": 3.84,
}


def flops_table(names: list[str], prompt_tokens: int, batch_size: int) -> dict[str, Any]:
    """Return the analytic table; nothing is computed but shapes.

    Args:
        names: presets.
        prompt_tokens: length of the prompt that the true ratio is for, at least 2.
        batch_size: prompts at once.

    Raises:
        InputError: no preset of that name.
    """
    rows = [preset_row(name, prompt_tokens, batch_size) for name in names or PRESETS]
    return {"prompt_tokens": prompt_tokens, "batch_size": batch_size, "rows": rows}


def preset_row(name: str, prompt_tokens: int, batch: int) -> dict[str, Any]:
    """Return one preset's counts, in FLOPs and parameters."""
    base, auxiliary, config = preset_parts(name)
    model = KVPModel(base, auxiliary, build_predictor(base, auxiliary, config), None, config, {})
    read = prompt_tokens - 1
    full, kvp = full_work(model, prompt_tokens, batch), kvp_work(model, prompt_tokens, batch)
    return {
        "preset": name,
        "base_parameters": parameters_of(base),
        "auxiliary_parameters": parameters_of(auxiliary),
        "predictor_parameters": parameters_of(model.predictor),
        "layer_map": layer_map_of(config),
        "paper_ratio": PAPER_RATIOS[name],
        "parameter_ratio": parameters_of(base) / parameters_of(auxiliary),
        "flops_ratio": full.flops / kvp.flops,
        "full_gflops": full.flops / 1e9,
        "kvp_gflops": kvp.flops / 1e9,
        "auxiliary_prefill_gflops": prefill_work(auxiliary, read, batch).flops / 1e9,
        "predict_gflops": predictor_work(model, read, batch).flops / 1e9,
        "first_step_gflops": step_work(base, prompt_tokens, batch).flops / 1e9,
        "full_weight_bytes": full.weight_bytes,
        "kvp_weight_bytes": kvp.weight_bytes,
    }


def layer_map_of(config: BundleConfig) -> list[int]:
    """Return the single source layer of every base layer, as the published pairs have them."""
    return [sources[0] for sources in config.predictor.layer_map if sources]
