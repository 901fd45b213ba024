"""The machine that everything runs on: BLAS, streams, and what the hardware is and can do."""
