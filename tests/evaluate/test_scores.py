"""Scores against values worked out by hand, and intervals against what they must cover."""

from itertools import combinations

import numpy as np
import pytest

from kvp_mlx.engine.decode import before
from kvp_mlx.evaluate.intervals import bootstrap
from kvp_mlx.evaluate.tasks import gsm8k, squad
from kvp_mlx.evaluate.tasks.gsm8k import last_number
from kvp_mlx.evaluate.tasks.humaneval import pass_at_k
from kvp_mlx.evaluate.tasks.triviaqa import exact_match


def test_exact_match_leaves_case_and_punctuation_aside() -> None:
    assert exact_match(" The Beatles! ", ["Stones", "the beatles"]) == 1
    assert exact_match("Beatles", ["The Beatles"]) == 0
    assert exact_match("", ["x"]) == 0


def test_squad_counts_shared_words() -> None:
    assert squad.exact_match("the Eiffel Tower.", ["Eiffel tower", "tower"]) == 1
    assert squad.f1("the tall Eiffel Tower", ["Eiffel Tower in Paris"]) == pytest.approx(2 * 2 / (3 + 4))
    assert squad.f1("a cat", ["dog", "cat"]) == 1
    assert squad.f1("", ["dog"]) == squad.f1("bird", ["dog"]) == 0


def test_last_number() -> None:
    assert last_number("from 3 to $1,250.50.") == 1250.5
    assert last_number("-7 degrees") == -7
    assert last_number("none") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"so \boxed{18 \text{ km}^2}", 18),
        (r"\boxed{1{,}000\text{ m}^{2}} of them, not 7", 1000),
        (r"\boxed{12 cm^3}", 12),
        ("the pages 3-4", 4),
        ("it sank to -4", -4),
    ],
)
def test_solution(text: str, number: float) -> None:
    assert gsm8k.solution(text) == number


def test_pass_at_k_is_the_share_of_draws_with_a_pass() -> None:
    for passed in range(6):
        draws = list(combinations([True] * passed + [False] * (5 - passed), 3))
        assert pass_at_k(5, passed, 3) == pytest.approx(np.mean([any(draw) for draw in draws]))


def test_bootstrap_is_the_normal_interval_of_many_items() -> None:
    values = np.random.default_rng(0).random(2000) < 0.3
    low, high = bootstrap(values)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 2000)
    assert low == pytest.approx(values.mean() - half, abs=0.004)
    assert high == pytest.approx(values.mean() + half, abs=0.004)
    assert bootstrap([0.5]) == [0.5, 0.5]


def test_text_ends_before_the_first_stop() -> None:
    assert before("one. two\nthree", ["\n", "."]) == "one"
    assert before("one", ["\n"]) == "one"
