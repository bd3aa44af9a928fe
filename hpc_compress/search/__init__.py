"""What to try next and whom to keep: pure functions of what they are told. Knows no torch, no disk and no Slurm."""
