"""The arm ``llama.cpp``: the same prompts through llama-cpp-python, on the default model's own GGUF."""

import os

import mlx.core as mx

from ..bundle.loading import KVPModel
from ..bundle.named import find_gguf
from ..errors import InputError
from .arm import Engine

PACKAGE = "llama-cpp-python"


def open_engine(longest_prompt: int) -> Engine:
    """Return a function that reads one prompt from scratch and returns the greedy first token.

    llama.cpp gets as many threads as there are cores, and the default sizes of its batches.

    Raises:
        InputError: llama-cpp-python is not installed, or the default model's GGUF is not on this machine.
    """
    try:
        from llama_cpp import Llama
    except ImportError as error:
        raise InputError(f"the arm llama.cpp needs 'pip install {PACKAGE}' (it compiles llama.cpp).") from error
    gguf = find_gguf()
    if gguf is None:
        raise InputError("the arm llama.cpp reads the default model's GGUF; run 'make setup' in the checkout first.")
    threads = os.cpu_count() or 1
    llama = Llama(
        str(gguf), n_ctx=longest_prompt + 1, n_threads=threads, n_threads_batch=threads, n_gpu_layers=-1, verbose=False
    )

    def first_token(_: KVPModel, ids: mx.array, __: int) -> list[int]:
        llama.reset()
        llama.eval(ids[0].tolist())
        return [int(llama.sample(temp=0.0))]

    return first_token
