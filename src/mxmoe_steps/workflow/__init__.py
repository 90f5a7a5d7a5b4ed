"""What the rules work out before any job runs, in plain Python: which jobs there are, and what decides each."""
