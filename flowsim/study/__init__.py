"""Studies of several runs: flows beside discrete training, limits of small steps, branches."""
