"""CoreNet KV-prediction checkpoints as bundles, and the verification of conversions."""
