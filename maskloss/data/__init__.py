"""COCO-format data: reading and validation, repair, augmentation, subsets, synthetic shapes."""
