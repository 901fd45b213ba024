"""From token ids to streamed text: dials, prefill and prediction, decoding, conversations, saved caches."""
