"""CIFAR-FS (Bertinetto et al., ICLR 2019): CIFAR-100's 32x32 images as PNG in {train,val,test}/<class>/.

From the official Python archive of CIFAR-100, in a minute:

    python data/cifar_fs/prepare.py --download
    python data/cifar_fs/prepare.py --archive cifar-100-python.tar.gz

Or from Bertinetto's archive of the same images, cifar100/data/<class>/*.png:

    python data/cifar_fs/prepare.py --archive cifar100.zip

To resume a killed run, run the same command again; it skips finished classes.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import archive

SIZE = (32, 32)
CLASS_SIZE = 600  # Krizhevsky 2009: 500 per class in its training set and 100 in its test set
CLASS_LISTS = HERE.parent / "splits" / "cifar_fs.json"
EXPECTED = archive.published_counts(train=(64, 38_400), val=(16, 9_600), test=(20, 12_000))


def main() -> None:
    args = archive.arguments(__doc__, HERE, archive.CIFAR_100)
    classes = archive.by_lists(archive.cifar100(args.archive), CLASS_LISTS, CLASS_SIZE)
    classes = archive.refuse_missing(classes, args.allow_missing)
    archive.write_classes(classes, args.out, SIZE, ".png", EXPECTED)


if __name__ == "__main__":
    archive.run(main)
