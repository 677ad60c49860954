"""Figures of models: classification, perplexity, policies, intervals."""
