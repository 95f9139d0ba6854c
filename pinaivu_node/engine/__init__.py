"""What turns a prompt into tokens.  It knows nothing of peers, dispatch tokens or money."""
