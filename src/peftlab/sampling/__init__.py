"""The decode engine that rollouts, chat, evaluation and data building share."""
