"""What a run tells its user: progress, measurements and served answers."""
