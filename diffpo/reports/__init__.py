"""What the folder of a training says, as one HTML page."""
