"""The package's exceptions; ``kvp_mlx.cli.main`` turns each into one line and an exit code."""


class KVPError(Exception):
    """The work failed although the input was fine (exit code 1)."""

    exit_code = 1


class InputError(KVPError):
    """A file, option or model that the user gave cannot be used (exit code 2)."""

    exit_code = 2


class PromptTooLongError(InputError):
    """A prompt does not fit the model's context window."""


class BundleError(InputError):
    """A bundle directory is incomplete, damaged or does not fit its base."""


class UnsupportedModelError(InputError):
    """The architecture keeps no plain per-layer keys and values that could be predicted."""
