"""Multi-turn conversation on any stack."""
