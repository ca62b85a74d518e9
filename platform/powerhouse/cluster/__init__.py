"""The cluster file, and the same cluster on one machine."""
