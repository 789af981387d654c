"""minirlaif: reinforcement learning from AI feedback, from scratch in PyTorch."""
