"""The arm ``llama.cpp``: the same prompts through llama-cpp-python, on the default model's own GGUF."""

import os
from collections.abc import Callable

from ..default_model import find_gguf
from ..errors import InputError

PACKAGE = "llama-cpp-python"


def llama_cpp_engine(longest_prompt: int) -> Callable[[list[int]], int]:
    """Return a function that reads a prompt's token ids from scratch and returns the greedy first token.

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

    def first_token(ids: list[int]) -> int:
        llama.reset()
        llama.eval(ids)
        return int(llama.sample(temp=0.0))

    return first_token
