"""Group level: from the tokens of this rank to the tokens that it works on with its groups, and back."""
