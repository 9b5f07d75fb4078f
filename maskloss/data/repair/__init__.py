"""Repair of annotation files.

`repair` makes the decisions that `read_coco` leaves to the user, and lists every change.
"""

# `annotation_file` has `repair`, from reading the file to writing the new one. `document` decodes and encodes it.
# `rounds` repairs the decoded document in rounds: each reads it as training would, and gives each fault that it finds
# to the fix for its kind. The fixes are functions of a `Draft`, which is the document in one round, in `categories`,
# `images`, `annotations`, `segmentations`, `geometry` and `conventions`. `log` collects the changes.

from maskloss.data.repair.annotation_file import repair
from maskloss.data.repair.log import Repair

__all__ = ["Repair", "repair"]
