"""What is compared: each way to a first token, the work it is, and the clock that times it."""
