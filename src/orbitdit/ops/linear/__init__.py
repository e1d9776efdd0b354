"""The layer: encode the tokens, decode the weights, multiply."""
