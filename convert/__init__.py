"""Model files of other projects, as mlx-lm directories (imports as ``kvp_mlx.convert``)."""
