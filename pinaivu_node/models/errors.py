"""What goes wrong with models, in words that say what to do."""

from __future__ import annotations


class ModelError(Exception):
    """Something about a model's files; the message is for the person at the terminal."""


class ModelMissing(ModelError):
    """This model is not on this machine; the message says how to get it."""


class ModelDamaged(ModelError):
    """Files of this model are not what they were when it was pulled."""


class PullFailed(ModelError):
    """The model could not be fetched; what can be resumed was kept."""
