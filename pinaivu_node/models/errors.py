"""What goes wrong with models, in words that say what to do."""

from __future__ import annotations


class ModelError(Exception):
    """Something about a model's files; the message is for the person at the terminal."""


class ModelMissing(ModelError):  # noqa: N818 - reads as what it is: the model is missing
    """This model is not on this machine; the message says how to get it."""


class ModelDamaged(ModelError):  # noqa: N818 - as above
    """Files of this model are not what they were when it was pulled."""


class PullFailed(ModelError):  # noqa: N818 - as above
    """The model could not be fetched; what can be resumed was kept."""
