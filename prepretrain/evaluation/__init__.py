"""Measures a model: evaluators, and the features, probes and adapters they use."""
