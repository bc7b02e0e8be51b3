"""The process that holds and forks sandboxed programs. Standard library only, and importable without its parents."""
