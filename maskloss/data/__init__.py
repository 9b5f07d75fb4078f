"""COCO-format data: reading and checking, augmentation, subsets, synthetic shapes."""
