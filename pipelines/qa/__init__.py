"""Questions about videos, answered by a language model with sparse prefill."""
