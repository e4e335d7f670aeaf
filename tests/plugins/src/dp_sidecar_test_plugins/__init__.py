"""vLLM plugins that only the tests use: none of this is needed on a GPU."""
