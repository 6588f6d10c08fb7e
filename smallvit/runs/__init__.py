"""Create, lock, read and aggregate run folders; draw curves; log to trackers."""
