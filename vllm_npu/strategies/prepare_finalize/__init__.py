"""Group-level stages: prepare brings a rank the tokens that it works on, finalize brings their output back."""
