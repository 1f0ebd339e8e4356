"""Expert level: from the tokens that this rank works on to the rows of its experts, and back."""
