"""Base models: loading, quantization, memory plans, attention backends."""
