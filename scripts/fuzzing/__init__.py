"""Coverage-guided fuzzing: `scripts/fuzz` says how to run it."""
