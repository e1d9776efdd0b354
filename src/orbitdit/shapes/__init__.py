"""Small worlds: 64x64 scenes of coloured shapes, prompts about them, and an exact judge.

What differs between worlds is data (`worlds`); the embedded model draws the first. A prompt says which objects a
picture must hold (`prompts`), a scene is one way to draw it (`scenes`), the detector reads the objects back from
pixels and says whether a picture keeps its prompt (`detector`), and the pipeline (`pipeline`, which needs diffusers)
generates pictures: with the trained model in `model/`, or with another one from its folder.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""Folder of the embedded pipeline, in diffusers' layout."""
