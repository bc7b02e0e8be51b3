"""Self-imitation: a sharded buffer of good trajectories, the baseline that re-judges them, and its files."""
