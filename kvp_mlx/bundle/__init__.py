"""A bundle: kvp.json, the predictor and its layer map, loading, and the bundles that have names."""
