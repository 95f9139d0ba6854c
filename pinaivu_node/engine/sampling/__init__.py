"""Logits to a token: penalties, cuts, noise and grammars, each by its request's own parameters."""
