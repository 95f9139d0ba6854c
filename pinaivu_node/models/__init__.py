"""The models that can be served: what they are, where they come from, what lies on this disk."""
