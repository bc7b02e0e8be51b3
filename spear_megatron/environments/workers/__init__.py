"""Environments in worker processes or Ray actors: the episode holds a handle, the state lives in the worker."""
