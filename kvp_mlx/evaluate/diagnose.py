"""What is wrong with a bundle: incoherent or forgetful answers, no gain in time, an auxiliary that does not fit."""

import copy
import statistics
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..arms.clock import first_token
from ..arms.kinds import parse_arm
from ..bundle.loading import KVPModel
from ..engine.prefill import Progress, base_prefill, predict_base_cache
from ..models.families import Cache
from ..train.recovery import ARMS, RecoveryMeasurement, token_losses
from .generation import measure_generation
from .layers import measure_layers
from .passages import grid_items
from .records import read_texts
from .task import Item
from .tasks import needle

MIN_RECOVERY, MIN_SEPARATION, MIN_COSINE, MIN_REALISED = 0.7, 0.5, 0.9, 0.6
ROUNDS = 3
NEEDLE_ARMS = ("full", "kvp", "kvp-64")
NEEDLE_LENGTHS, NEEDLE_DEPTHS = (128, 256), (0.1, 0.5, 0.9)
MIN_FOUND = 0.5
"""Share of the full model's needles below which they count as lost."""


def diagnose(
    model: KVPModel,
    windows: list[list[int]],
    continuation_tokens: int,
    progress: Progress = lambda done, total: None,
    *,
    needles: Sequence[Item] = (),
) -> dict[str, Any]:
    """Examine a bundle on documents.

    Args:
        model: the bundle.
        windows: token ids, each a prompt followed by ``continuation_tokens``; at least two, of one length.
        continuation_tokens: tokens scored.
        progress: called with (steps done, steps in all).
        needles: items of the task ``needle``, short ones will do; none leaves that check out.

    Returns:
        ``context`` (as ``kvp eval context``), ``layers`` (as ``--per-layer``, each with the ``gain``, in nats per
        token, of putting its exact entries in), ``ttft``, ``needles`` (how many each arm found, of how many) and
        ``findings``: problem, evidence, remedy.
    """
    recovery = RecoveryMeasurement(model, windows, continuation_tokens, arms=ARMS).measure()
    progress(1, 5)
    layers = measure_layers(model, windows, continuation_tokens)
    progress(2, 5)
    gains = swap_gains(model, windows, continuation_tokens)
    for row in layers:
        row["gain"] = gains[row["layer"]]
    progress(3, 5)
    ttft = compare_ttft(model, [window[:-continuation_tokens] for window in windows])
    progress(4, 5)
    found = count_needles(model, needles)
    progress(5, 5)
    findings = [*coherence(recovery, layers), *lost_facts(found), *fit_of_auxiliary(recovery, model), *speed(ttft)]
    return {"context": recovery, "layers": layers, "ttft": ttft, "needles": found, "findings": findings}


def short_needles(tokenizer: TokenizerWrapper, seed: int) -> list[Item]:
    """Return an item of the task ``needle`` for every length and depth that is examined, in our sample of text."""
    cells = len(NEEDLE_LENGTHS) * len(NEEDLE_DEPTHS)
    return grid_items(needle.ask, read_texts([]), tokenizer, NEEDLE_LENGTHS, NEEDLE_DEPTHS, seed, cells)


def count_needles(model: KVPModel, needles: Sequence[Item]) -> dict[str, int]:
    """Return how many hidden numbers each arm says, and ``of`` how many."""
    measure, found = measure_generation(needle.ANSWER), {"of": len(needles)}
    for name in NEEDLE_ARMS:
        rows = measure(model, [(parse_arm(name), item) for item in needles])
        found[name] = sum(int(row["score"]) for row in rows)
    return found


def swap_gains(model: KVPModel, windows: Sequence[list[int]], continuation_tokens: int) -> dict[int, float]:
    """Return, per predicted layer, how far exact entries in that layer alone lower the loss, in nats per token."""
    predicted_layers = [layer for layer, source in enumerate(model.config.predictor.layer_map) if source is not None]
    gains = dict.fromkeys(predicted_layers, 0.0)
    for window in windows:
        split = len(window) - continuation_tokens
        prompt, rest = mx.array([window[: split - 1]]), window[split - 1 :]
        exact, predicted = base_prefill(model, prompt), predict_base_cache(model, prompt)
        before = loss_on(model, predicted, rest)
        for layer in predicted_layers:
            mixed = [*predicted[:layer], exact[layer], *predicted[layer + 1 :]]
            gains[layer] += (before - loss_on(model, mixed, rest)) / len(windows)
    return gains


def loss_on(model: KVPModel, cache: Cache, rest: list[int]) -> float:
    """Return the mean loss of ``rest[1:]`` on a cache, which is left as it was."""
    return float(token_losses(model.base, copy.deepcopy(cache), rest).mean())


def compare_ttft(model: KVPModel, prompts: Sequence[list[int]]) -> dict[str, float]:
    """Return median TTFT of both paths in ms, the speed-up, what the arithmetic promises, and the share realised."""
    arms = {name: parse_arm(name) for name in ("full", "kvp")}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(ROUNDS + 1):
        for name, arm in arms.items():
            ttft_ms = first_token(model, arm, mx.array([prompts[number % len(prompts)]])).ttft_ms
            if number:  # the first round warms up
                times[name].append(ttft_ms)
    median = {name: statistics.median(values) for name, values in times.items()}
    tokens = len(prompts[0])
    promised = arms["full"].work(model, tokens).flops / arms["kvp"].work(model, tokens).flops
    speedup = median["full"] / median["kvp"]
    return {
        "prompt_tokens": tokens,
        "full_ms": median["full"],
        "kvp_ms": median["kvp"],
        "speedup": speedup,
        "flops_ratio": promised,
        "realised": speedup / promised,
    }


def finding(problem: str, evidence: str, remedy: str) -> dict[str, str]:
    """Return one finding."""
    return {"problem": problem, "evidence": evidence, "remedy": remedy}


def coherence(measured: dict[str, Any], layers: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return what says that answers from the predicted cache will not hang together."""
    found, recovery, separation = [], measured["arms"]["kvp"]["recovery"], measured["separation"]
    worst = sorted(layers, key=lambda row: -row["gain"])[:3]
    named = ", ".join(f"{row['layer']} (gain {row['gain']:.3f}, cosine {row['attention_cosine']:.2f})" for row in worst)
    if recovery < MIN_RECOVERY:
        found.append(
            finding(
                "answers will be incoherent",
                f"recovery {recovery:.2f} (below {MIN_RECOVERY}); exact entries would help most in layers {named}",
                "train longer or with more layers (kvp train --layers), or answer with --exact-tail 64",
            )
        )
    elif separation is not None and separation < MIN_SEPARATION:
        found.append(
            finding(
                "the genre arrives, the text does not",
                f"separation {separation:.2f} (below {MIN_SEPARATION}) at recovery {recovery:.2f}",
                "train on text of this kind with a longer window (kvp train --data --window)",
            )
        )
    blurred = [row for row in layers if row["attention_cosine"] < MIN_COSINE]
    if blurred and len(blurred) < len(layers) / 2:
        found.append(
            finding(
                "a few layers are far off",
                f"attention cosine below {MIN_COSINE} in layers {', '.join(str(row['layer']) for row in blurred)}",
                "look for a wrong layer map or a conversion error (kvp convert verify); train on",
            )
        )
    return found


def lost_facts(needles: dict[str, int]) -> list[dict[str, str]]:
    """Return what says that single facts of a prompt are lost, though its gist arrives."""
    full, kvp, tail, of = (needles[name] for name in ("full", "kvp", "kvp-64", "of"))
    if full == 0 or kvp >= MIN_FOUND * full:
        return []
    return [
        finding(
            "single facts of the prompt are lost",
            f"numbers hidden in short prompts: full finds {full} of {of}, kvp {kvp}, kvp with exact tail 64 {tail}",
            "answer look-ups with --prefill full, or with --exact-tail where the fact stands near the end; for "
            "a better bundle: more --layers, or training on (kvp train)",
        )
    ]


def fit_of_auxiliary(measured: dict[str, Any], model: KVPModel) -> list[dict[str, str]]:
    """Return what says that the auxiliary reads another language than the base."""
    auxiliary, without = measured["arms"]["auxiliary"]["nll"], measured["arms"]["no_context"]["nll"]
    if model.is_prefix or auxiliary < without:
        return []
    return [
        finding(
            "the auxiliary does not fit",
            f"alone and with the prompt it is worse ({auxiliary:.2f} nats) than the base without ({without:.2f})",
            "check that both share tokeniser and special tokens; choose a stronger auxiliary, or train it "
            "(--train-auxiliary)",
        )
    ]


def speed(ttft: dict[str, float]) -> list[dict[str, str]]:
    """Return what says that the first token does not come sooner, or not as much as the arithmetic allows."""
    measured = (
        f"{ttft['speedup']:.2f}x at {ttft['prompt_tokens']} tokens, the arithmetic allows {ttft['flops_ratio']:.2f}x"
    )
    if ttft["flops_ratio"] < 1.2:
        return [finding("there is little to gain", measured, "a smaller auxiliary or fewer --layers; longer prompts")]
    if ttft["realised"] < MIN_REALISED:
        return [
            finding(
                "the gain in work is not realised",
                measured,
                "short prompts: the first step's weights dominate (kvp bench ttft shows the floor); otherwise look at "
                "kvp doctor, other load on the machine and --prefill-step-size",
            )
        ]
    return []
