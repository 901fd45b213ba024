"""``python -m kvp_mlx`` is ``kvp``."""

from .cli.main import main

if __name__ == "__main__":
    main()
