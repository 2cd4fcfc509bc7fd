"""Learning from rewards: answers that the model in training generates, their rewards, and batches made of them."""
