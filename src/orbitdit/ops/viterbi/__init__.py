"""The codes of least squared error on a trellis, when a model is quantized."""
