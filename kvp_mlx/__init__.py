"""KV Prediction on mlx-lm: a sooner first token for local language models.

Letters in shape comments: B batch, T prompt positions, H key/value heads, D head_dim; ``H*D`` means merged heads,
head-major. The names below load on first use, so that importing the package stays quick.
"""

import importlib
import os
import sys
from typing import Any

from .device.blas import load_fast_blas
from .device.limits import clip_open_files

__version__ = "0.6.0"

clip_open_files()
load_fast_blas()  # has to come before the first import of mlx.core, see device/blas.py
if sys.platform == "linux":  # depth first, two streams keep two cores 91 % busy, not 83 % (OpenELM C-270M, 512 tokens)
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1")

_HOMES = {
    "load": "bundle.loading",
    "load_any": "bundle.loading",
    "KVPModel": "bundle.loading",
    "Dial": "engine.dial",
    "predict_base_cache": "engine.prefill",
    "base_prefill": "engine.prefill",
    "stream_generate": "engine.reply",
    "Piece": "engine.reply",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return ["__version__", *_HOMES]
