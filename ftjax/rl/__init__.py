"""Learning from answers that the model in training generates: their rewards, or what a teacher says, and batches of them."""
