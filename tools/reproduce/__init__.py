"""The paper's claims at small scale, with the product: `python -m tools.reproduce TABLE [--run]` (docs/results/)."""
