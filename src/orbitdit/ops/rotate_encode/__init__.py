"""Tokens to values on a number grid and one scale a token: rotate, look up."""
