"""Expert-level stages: dispatch brings tokens to the ranks of their experts, combine brings the experts' rows back."""
