"""Conversations to token ids, by the model's own template, and answers back to text and calls."""
