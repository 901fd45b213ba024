"""``python -m kvp_mlx`` is ``kvp``."""

import sys

if sys.path and not sys.flags.safe_path:
    del sys.path[0]  # the folder that one is in: a model's, perhaps, whose Python is not to be taken for a library

from .cli.main import program

if __name__ == "__main__":
    program()
