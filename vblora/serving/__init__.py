"""Serving adapters: many at once on one model, and on demand in vLLM."""
