"""What a run looks like: pictures, curves, and one self-contained HTML page."""
