"""Reinforcement learning on adapters: rollouts, PPO, RLOO, KL controllers."""
