"""Models on disk: naming, finding, reading and writing them, and what their tensors and tokens are."""
