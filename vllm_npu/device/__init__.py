"""The experts' ops: portable definitions here; an Ascend device runs its own."""
