"""tieredImageNet (Ren et al., ICLR 2018): ImageNet's photographs, 84x84 RGB as PNG in {train,val,test}/<wnid>/.

From ImageNet's training part (ILSVRC 2012), which is not ours to give: from its archive as it is, 138 GB,
or from a folder of class folders <wnid>/ or class archives <wnid>.tar; an hour or two, 12 GB written:

    python data/tiered_imagenet/prepare.py --archive ILSVRC2012_img_train.tar

A run that was killed is simply started again: finished classes are skipped.
"""

import json
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import archive

SIZE = (84, 84)  # of the images that the authors give, as those of MiniImagenet
CLASS_LISTS = HERE.parent / "splits" / "tiered_imagenet.json"
EXPECTED = {
    "train classes": 351,
    "train images": 448_695,
    "val classes": 97,
    "val images": 124_261,
    "test classes": 160,
    "test images": 206_209,
}


def photographs(source: archive.File) -> archive.Images:
    """All photographs of one class."""
    return archive.photographs(source) or archive.fail(f"{source} has no .JPEG images")


def main() -> None:
    args = archive.arguments(__doc__, HERE, photographs=True)
    places: dict[str, archive.File] = {}
    for source in args.archive:
        places |= archive.imagenet(source)
    lists = json.loads(CLASS_LISTS.read_text())
    listed = {f"{split}/{wnid}": wnid for split in archive.SPLITS for wnid in lists[split]}
    absent = [archive.Class(folder, {}, missing=1) for folder, wnid in listed.items() if wnid not in places]
    archive.refuse_missing(absent, args.allow_missing)
    # Read one after the other: the names of all images would fill the memory.
    classes = [
        archive.Class(folder, partial(photographs, places[wnid]), missing=0)
        for folder, wnid in listed.items()
        if wnid in places
    ]
    archive.write_classes(classes, args.out, args.short_side or SIZE, ".png", EXPECTED, whole=not args.allow_missing)


if __name__ == "__main__":
    archive.run(main)
