"""What benchmarks/decoding.py measures: against plain loops (same tokens), at full size on a GPU, and the caches' error.

plain_loops.py: what our decoder is held against; random_models.py: models of every size with random weights.
"""
