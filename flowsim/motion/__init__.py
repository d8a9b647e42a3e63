"""Where trajectories are, what clocks show, and the one seam between rules and everything else."""
