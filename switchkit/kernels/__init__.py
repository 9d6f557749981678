"""Triton kernels for what plain operations would walk through a GPU's memory several times for."""
