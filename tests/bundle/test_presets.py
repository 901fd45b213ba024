"""The published configurations, against method.md's exact parameter counts and widths."""

import pytest
from mlx.utils import tree_flatten

from kvp_mlx.bundle.loading import build_predictor
from kvp_mlx.bundle.presets import PRESETS, preset_parts
from kvp_mlx.errors import InputError
from kvp_mlx.models.families import kv_shapes
from kvp_mlx.models.openelm import openelm_config

BASES = {"1_1b": 1_080_153_600, "3b": 3_037_040_640}
AUXILIARIES = {
    ("1_1b", "450m"): 457_375_744,
    ("1_1b", "270m"): 271_691_008,
    ("1_1b", 0.75): 806_969_984,
    ("1_1b", 0.5): 559_738_624,
    ("1_1b", 0.25): 300_448_640,
    ("3b", "1_1b"): 1_080_153_600,
    ("3b", "450m"): 457_375_744,
    ("3b", "270m"): 271_691_008,
    ("3b", 0.75): 2_260_774_656,
    ("3b", 0.5): 1_541_918_208,
    ("3b", 0.25): 791_604_480,
}
PREDICTORS = {
    ("1_1b", "450m"): 6_206_592,
    ("1_1b", "270m"): 5_436_544,
    ("1_1b", 0.75): 8_672_384,
    ("1_1b", 0.5): 8_672_384,
    ("1_1b", 0.25): 8_459_392,
    ("3b", "1_1b"): 16_032_768,
    ("3b", "450m"): 12_264_448,
    ("3b", "270m"): 10_691_584,
    ("3b", 0.75): 25_469_952,
    ("3b", 0.5): 25_469_952,
    ("3b", 0.25): 24_749_056,
}
WIDTHS = {
    "270m": [192] * 5 + [256] * 7 + [320] * 4,
    "450m": [192] * 3 + [256] * 7 + [320] * 6 + [384] * 4,
    "1_1b": [256] * 3 + [320] * 7 + [384] * 8 + [448] * 6 + [512] * 4,
    "3b": [384] * 4 + [512] * 14 + [640] * 12 + [768] * 6,
}


def parameters(module: object) -> int:
    return sum(array.size for _, array in tree_flatten(module.parameters()))


def test_there_are_eleven() -> None:
    assert len(PRESETS) == 11
    assert "openelm-1_1b-kvp-c-270m" in PRESETS
    assert "openelm-3b-kvp-lp-0_75" in PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    base, auxiliary, config = preset_parts(name)  # nothing is evaluated: shapes are enough
    choice = PRESETS[name]
    assert parameters(base) == BASES[choice[0]]
    assert parameters(auxiliary) == AUXILIARIES[choice]
    assert parameters(build_predictor(base, auxiliary, config)) == PREDICTORS[choice]


@pytest.mark.parametrize("size", WIDTHS)
def test_key_value_widths(size: str) -> None:
    name = next(name for name, choice in PRESETS.items() if size in choice)
    models = preset_parts(name)[:2]
    found = [[shape.width for shape in kv_shapes(model)] for model in models]
    assert WIDTHS[size] in found
    assert openelm_config(size)["num_transformer_layers"] == len(WIDTHS[size])


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="openelm-3b-kvp-c-270m"):
        preset_parts("openelm-7b")
