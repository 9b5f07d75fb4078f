"""The parts of `read_coco`."""

# `json_stream` and `formats` decode a file. `columns` keeps its annotations in arrays, and reads single fields with
# `entries`. `categories` and `images` read these two lists, `images` with `file_names`. `annotations` validates the
# annotations in an `annotation_table`, with `segmentations`, `boxes` and `conventions`.
