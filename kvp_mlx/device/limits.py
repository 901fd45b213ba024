"""The system's limit on open files, which mlx-lm sets when it is imported."""

import resource

WANTED_FILES = 4096  # mlx_lm/utils.py


def clip_open_files() -> None:
    """Let mlx-lm be imported where fewer files may be open than it asks for: it then gets what there is."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or most >= WANTED_FILES:
        return
    set_limit = resource.setrlimit

    def clipped(kind: int, limits: tuple[int, int]) -> None:
        if kind == resource.RLIMIT_NOFILE:
            soft, hard = limits
            limits = min(soft, most), min(hard, most)
        set_limit(kind, limits)

    resource.setrlimit = clipped
