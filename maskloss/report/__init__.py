"""Reports of runs: drawn masks, loss curves and one self-contained HTML page."""
