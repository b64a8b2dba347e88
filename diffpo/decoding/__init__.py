"""Decoding: the denoising loop, the commit rules, and the trajectory they leave."""
