"""Scores of answers, and how sure a mean of them is."""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
RESAMPLES = 2000
CONFIDENCE = 0.95


def bare(text: str) -> str:
    """Return text without case, punctuation and outer white space, as TriviaQA's template compares it."""
    return text.strip().lower().translate(str.maketrans("", "", string.punctuation))


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """Return whether a bare answer is one of the accepted."""
    return float(bare(answer) in map(bare, accepted))


def squad_words(text: str) -> list[str]:
    """Return the words that SQuAD's own script compares: no case, punctuation or articles."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return ARTICLES.sub(" ", plain).split()


def squad_exact(answer: str, accepted: Sequence[str]) -> float:
    """Return SQuAD's exact match, the best over the accepted answers."""
    return max(float(squad_words(answer) == squad_words(other)) for other in accepted)


def squad_f1(answer: str, accepted: Sequence[str]) -> float:
    """Return SQuAD's F1 of shared words, the best over the accepted answers."""
    return max(_f1(squad_words(answer), squad_words(other)) for other in accepted)


def _f1(words: list[str], others: list[str]) -> float:
    shared = sum((Counter(words) & Counter(others)).values())
    if not words or not others:
        return float(words == others)
    return 2 * shared / (len(words) + len(others))


def last_number(text: str) -> float | None:
    """Return the last number in a text (GSM8K's answer), thousands separators dropped."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples passes (arXiv 2107.03374, section 2.1)."""
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def bootstrap(values: Sequence[float], statistic: Callable[[np.ndarray], float] = np.mean) -> list[float]:
    """Return the 95 % interval of a statistic over items, by resampling them (percentiles, seeded)."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    means = [statistic(sample) for sample in np.asarray(values, float)[drawn]]
    edge = 50 * (1 - CONFIDENCE)
    return [float(bound) for bound in np.percentile(means, [edge, 100 - edge])]


def bootstrap_ratio(values: Sequence[float], whole: Sequence[float]) -> list[float]:
    """Return the 95 % interval of the mean of ``values`` over that of ``whole``, item by item the same resamples."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    parts, wholes = (np.asarray(x, float)[drawn].mean(axis=1) for x in (values, whole))
    edge = 50 * (1 - CONFIDENCE)
    ratios = parts[wholes > 0] / wholes[wholes > 0]
    return [float(bound) for bound in np.percentile(ratios, [edge, 100 - edge])]
