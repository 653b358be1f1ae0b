"""One module a backend, each with the functions that docs/architecture.md lists under "The contract of a backend"."""
