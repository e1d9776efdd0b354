"""Packed codes to values on a number grid and one scale a row."""
