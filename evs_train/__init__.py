"""Uptraining of video language models for Efficient Video Sampling. See README.md; start reading in `trainer.py`."""
