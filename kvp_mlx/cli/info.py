"""``kvp info``."""

from typing import Any

from ..bundle.loading import describe
from .models import measured_line
from .options import DEFAULT_MODEL, Json, ModelArgument
from .output import plural, print_json, show


def info(model: ModelArgument = DEFAULT_MODEL, json: Json = False) -> None:
    """Show what a bundle is.

    Its parts, their sizes, how it was made last, and what was measured on it; --json has all of kvp.json. Of any other
    model, what its layers are, and what is missing for them to be predicted.
    """
    result = describe(model)
    if json:
        print_json(result)
        return
    show(model)
    for name, value in model_rows(result) if "architecture" in result else rows(result):
        show(f"  {name:11} {value}")


def model_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a screen shows of a model without a bundle."""
    layers = [f"{count} {kind}" for kind, count in result["layers"].items()]
    next_step = "possible once a bundle is made (kvp fit, kvp train)"
    if result["missing"]:
        next_step = f"not possible, it lacks {' and '.join(result['missing'])} (docs/families.md)"
    return [
        ("path", result["path"]),
        ("model", result["architecture"]),
        ("layers", ", ".join(layers)),
        ("prediction", next_step),
    ]


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what fits a screen of a bundle's description."""
    base, auxiliary, predictor = result["base"], result["auxiliary"], result["predictor"]
    predicted = sum(sources is not None for sources in predictor["layer_map"])
    pinned = f"@{base['revision']}" if base["revision"] else ""
    count = predictor["preceding"]
    reads = predictor["input"] + (f" of a token and the {count} before it" if count else "")
    found = [
        ("path", result["path"]),
        (
            "base",
            f"{base['alias'] or base['hub_id'] or base['path']}{pinned}{', in any precision' * bool(base['mark'])}",
        ),
        ("auxiliary", f"{auxiliary['alias'] or auxiliary['kind']}, {plural(auxiliary['layers'], 'layer')}"),
        ("predictor", f"reads {reads}, predicts {predicted} of {len(predictor['layer_map'])} layers"),
    ]
    if predictor["parameters"] is not None:
        found.append(("parameters", f"{predictor['parameters']:,}"))
    if predictor["recompute"] is not None:
        found.append(("recomputes", f"{100 * predictor['recompute']:g} % of the prompt's tokens"))
    found += dial_rows(result["dials"])
    sizes = [f"{part} {size / 1e6:.1f} MB" for part, size in result["size_bytes"].items() if size]
    found.append(("size", ", ".join(sizes)))
    if made := made_line(result["training"]):
        found.append(("made by", made))
    found += [("measured", line) for line in measured_line(result["measured"]).split("; ") if line]
    return found


def dial_rows(dials: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return a row for each measured dial: its quality, from which length on it holds, what it reads and gives."""
    found = []
    for dial in dials:
        how = "full prefill"
        if dial["path"] != "full":
            parts = {"exact_head": "head {}", "exact_tail": "tail {}", "recompute": "recompute {:g}"}
            parts |= {"refine_tokens": "refine {}"}
            parts |= {"recovery": "recovery {:.2f}", "retention": "F1 {:.0%}", "sooner": "{:.2f}x sooner"}
            how = ", ".join(form.format(dial[name]) for name, form in parts.items() if dial[name] is not None)
        found.append((dial["quality"], f"from {dial['from_tokens']:5,} tokens: {how or 'auto'}"))
    return found


def made_line(training: dict[str, Any]) -> str:
    """Return how a bundle was made last, in a line: method, tokens, minutes, and how well it did on held-out text."""
    parts = [str(training[key]) for key in ("method",) if training.get(key)]
    parts += [f"{training[key]:,} {key}" for key in ("tokens", "minutes") if isinstance(training.get(key), int | float)]
    if "start" in training:
        method = training["start"].get("method") if isinstance(training["start"], dict) else None
        parts.append("from maps in closed form" if method == "ridge" else "from an earlier bundle")
    held_out = measured_line({"on held-out text": training.get("validation")})
    return "; ".join(", ".join(part for part in group if part) for group in (parts, [held_out]) if any(group))
