"""Training LLM agents with SPEAR (arXiv 2509.22601) on megatron-core. Importing this package has no side effects."""

__version__ = "0.1.0"
