"""tieredImageNet (Ren et al., ICLR 2018): ImageNet's photographs, 84x84 RGB as PNG in {train,val,test}/<wnid>/.

The source is ImageNet's training set (ILSVRC 2012), which we may not distribute: its archive of 138 GB, or a folder
of class folders <wnid>/ or class archives <wnid>.tar. Preparation takes an hour or two and writes 12 GB:

    python data/tiered_imagenet/prepare.py --archive ILSVRC2012_img_train.tar

To resume a killed run, run the same command again; it skips finished classes.
"""

import json
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import archive

SIZE = (84, 84)  # as in the authors' version
CLASS_LISTS = HERE.parent / "splits" / "tiered_imagenet.json"
EXPECTED = archive.published_counts(train=(351, 448_695), val=(97, 124_261), test=(160, 206_209))


def main() -> None:
    args = archive.arguments(__doc__, HERE, photographs=True)
    sources: dict[str, archive.File] = {}
    for source in args.archive:
        sources |= archive.imagenet(source)
    lists = json.loads(CLASS_LISTS.read_text())
    wnids = {f"{split}/{wnid}": wnid for split in archive.SPLITS for wnid in lists[split]}
    absent = [archive.Class(folder, {}, missing=1) for folder, wnid in wnids.items() if wnid not in sources]
    archive.refuse_missing(absent, args.allow_missing)
    # List one class at a time, because the names of all images would fill the memory.
    classes = [
        archive.Class(folder, partial(archive.photographs, sources[wnid]), missing=0)
        for folder, wnid in wnids.items()
        if wnid in sources
    ]
    archive.write_classes(classes, args.out, args.short_side or SIZE, ".png", EXPECTED, whole=not args.allow_missing)


if __name__ == "__main__":
    archive.run(main)
