"""`wardround simulate audit`: attacks on what leaves a hospital, to measure what the accountant promises."""
