//! Properties of the real transition functions, proven by exhaustive or random exploration; see `tests/`.
