"""The loss of the per-position terms: from hidden states and head to named sums and their weighted total."""
