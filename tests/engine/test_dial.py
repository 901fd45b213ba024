"""The dial: what it refuses, and what it settles on."""

import dataclasses
import math

import pytest

from kvp_mlx.bundle.config import (
    AuxiliaryConfig,
    BaseConfig,
    BundleConfig,
    MeasuredDial,
    PredictorConfig,
    RecomputeConfig,
)
from kvp_mlx.engine.calibration import AUTO_MIN_PROMPT_TOKENS
from kvp_mlx.engine.dial import QUALITIES, Dial, dial_of
from kvp_mlx.errors import InputError


def bundle(recompute: RecomputeConfig | None = None, dials: tuple[MeasuredDial, ...] = ()) -> BundleConfig:
    return BundleConfig(
        base=BaseConfig(fingerprint="none", path="base"),
        auxiliary=AuxiliaryConfig(kind="prefix", layers=1),
        predictor=PredictorConfig(input="hidden_state", layer_map=(None, None, (1,))),
        recompute=recompute,
        dials=dials,
    )


def path(dial: Dial, prompt_tokens: int, cached: int = 0, auto_min: int = AUTO_MIN_PROMPT_TOKENS) -> str:
    return dial.settled(bundle(), prompt_tokens, cached, auto_min).path


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"path": "fast"}, "prefill is one of kvp, full, auto, not 'fast'."),
        ({"exact_head": -1}, "exact_head counts tokens, so it cannot be -1."),
        ({"exact_tail": -3}, "exact_tail counts tokens, so it cannot be -3."),
        ({"recompute": -0.1}, "the share of tokens to recompute lies between 0 and 1, not at -0.1."),
        ({"recompute": 1.5}, "the share of tokens to recompute lies between 0 and 1, not at 1.5."),
        ({"recompute": math.nan}, "the share of tokens to recompute lies between 0 and 1, not at nan."),
        ({"recompute": math.inf}, "the share of tokens to recompute lies between 0 and 1, not at inf."),
    ],
)
def test_every_bad_value_is_named(values: dict, line: str) -> None:
    with pytest.raises(InputError) as refused:
        Dial(**values)
    assert str(refused.value) == line
    with pytest.raises(InputError):
        dial_of(**values)


def test_a_dial_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Dial().exact_head = 1


def test_qualities_and_what_is_given_beside_them() -> None:
    assert {name: dial_of(name) for name in QUALITIES} == QUALITIES
    assert dial_of() == QUALITIES["balanced"] == Dial()
    assert dial_of("exact") == Dial("full", 0, 0)
    assert dial_of("fast", path="kvp", exact_head=3, recompute=0.0) == Dial("kvp", 3, 32, 0.0)
    assert dial_of("balanced", exact_tail=0) == Dial("auto", 32, 0)
    with pytest.raises(InputError, match="quality is one of fast, balanced, exact, not 'best'"):
        dial_of("best")


def test_the_path_is_chosen_by_what_is_left_to_predict() -> None:
    enough = AUTO_MIN_PROMPT_TOKENS + 1  # the last prompt token is never predicted
    assert path(Dial("full", 0, 0), 10_000) == "full"
    assert path(Dial("kvp", 0, 0), 2) == "kvp"
    assert path(Dial("kvp", 0, 0), 1) == "full"
    assert path(Dial("kvp", 0, 8), 10) == "kvp"
    assert path(Dial("kvp", 0, 9), 10) == "full"
    assert path(Dial("kvp", 0, 100), 10) == "full"
    assert path(Dial("auto", 0, 0), enough) == "kvp"
    assert path(Dial("auto", 0, 0), enough - 1) == "full"
    assert path(Dial("auto", 0, 1), enough) == "full"
    assert path(Dial("auto", 0, 1), enough + 1) == "kvp"
    assert path(Dial("auto", 0, 0), 1) == "full"


def test_what_is_cached_and_the_exact_head_count_once() -> None:
    assert path(Dial("kvp", 5, 2), 9) == "kvp"
    assert path(Dial("kvp", 6, 2), 9) == "full"
    assert path(Dial("kvp", 5, 2), 9, cached=4) == "kvp"
    assert path(Dial("kvp", 5, 2), 9, cached=6) == "full"
    assert path(Dial("auto", 10, 0), 31, cached=20, auto_min=10) == "kvp"
    assert path(Dial("auto", 10, 0), 31, cached=21, auto_min=10) == "full"
    assert Dial("kvp", 5, 2).predicted_tokens(20, 3) == Dial("kvp", 0, 2).predicted_tokens(20, 5) == 12


def test_a_settled_dial_says_what_runs() -> None:
    able = bundle(RecomputeConfig(share=0.25))
    assert Dial("auto", 3, 4).settled(able, 200, 0, 64) == Dial("kvp", 3, 4, 0.25)
    assert Dial("auto", 3, 4, 0.5).settled(able, 200, 0, 64) == Dial("kvp", 3, 4, 0.5)
    assert Dial("auto", 3, 4).settled(able, 20, 0, 64) == Dial("full", 3, 0, 0.25)


def test_the_share_is_the_bundles_unless_it_is_given() -> None:
    able, unable = bundle(RecomputeConfig(share=0.25)), bundle()
    assert (Dial().share(able), Dial(recompute=0.1).share(able), Dial(recompute=0.0).share(able)) == (0.25, 0.1, 0.0)
    assert (Dial().share(unable), Dial(recompute=0.0).share(unable)) == (0.0, 0.0)
    for ask in (Dial(recompute=0.1).share, lambda config: Dial("full", recompute=0.1).settled(config, 9, 0, 0)):
        with pytest.raises(InputError, match="cannot tell which tokens to recompute"):
            ask(unable)


MEASURED = bundle(
    RecomputeConfig(share=0.25),
    (
        MeasuredDial(quality="balanced", from_tokens=900, exact_head=0, exact_tail=64, recompute=0.0),
        MeasuredDial(quality="balanced", from_tokens=0, path="full"),
        MeasuredDial(quality="balanced", from_tokens=300, exact_head=8, exact_tail=16, recompute=0.1),
        MeasuredDial(quality="fast", from_tokens=300, exact_tail=4),
    ),
)


def test_what_a_bundle_measured_counts_by_prompt_length() -> None:
    found = {length: dial_of("balanced").at(MEASURED, length) for length in (1, 299, 300, 899, 900, 10**6)}
    assert [dial.path for dial in found.values()] == ["full", "full", "auto", "auto", "auto", "auto"]
    assert found[300] == found[899] == Dial("auto", 8, 16, 0.1)
    assert found[900] == found[10**6] == Dial("auto", 0, 64, 0.0)
    assert found[300].at(MEASURED, 900) == found[300]  # it stands for no quality any more
    assert dial_of("fast").at(MEASURED, 299) == QUALITIES["fast"]  # nothing was measured there
    assert dial_of("fast").at(MEASURED, 300) == Dial("auto", 0, 4, None)  # what is left out is as it was
    assert dial_of("exact").at(MEASURED, 900) == QUALITIES["exact"]
    assert Dial().at(MEASURED, 900) == Dial()
    for dial in (*QUALITIES.values(), dial_of("fast", exact_tail=3)):
        assert dial.at(bundle(), 900) == dial


def test_what_is_given_beside_a_quality_stays() -> None:
    constants = QUALITIES["balanced"]
    assert dial_of(exact_tail=constants.exact_tail).at(MEASURED, 300) == Dial("auto", 8, 32, 0.1)
    assert dial_of(exact_head=5, recompute=0.0).at(MEASURED, 300) == Dial("auto", 5, 16, 0.0)
    assert dial_of(path="full").at(MEASURED, 300).path == "full"
    assert dial_of(path="kvp").at(MEASURED, 300) == Dial("kvp", 8, 16, 0.1)
    assert dial_of(path="kvp").at(MEASURED, 10) == Dial("kvp", 32, 32, None)
    assert dial_of(exact_tail=5).at(MEASURED, 10).path == "full"


def test_auto_still_reads_in_full_where_prediction_does_not_pay() -> None:
    dial = dial_of("balanced").at(MEASURED, 300)
    assert dial.settled(MEASURED, 300, 0, 276).path == "full"
    assert dial.settled(MEASURED, 300, 0, 275) == Dial("kvp", 8, 16, 0.1)
