"""Reinforcement learning on adapters: rollouts, PPO, KL controllers."""
