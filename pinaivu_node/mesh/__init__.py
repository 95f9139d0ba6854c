"""The only door to other peers."""
