"""Training, evaluation and prediction on COCO-format data."""
