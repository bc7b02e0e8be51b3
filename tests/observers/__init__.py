"""Observers of configuration fields: each shows by the real code that two values of one field are not the same."""
