"""Pure tensor functions: masks, log-probabilities, KL, advantages, losses. Imports torch only."""
