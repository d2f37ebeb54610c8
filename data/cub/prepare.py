"""CUB-200-2011 (Wah et al. 2011): photographs of birds, 84x84 RGB as PNG in {train,val,test}/<class>/.

The split is that of Chen et al., ICLR 2019. From the official archive, in a few minutes:

    python data/cub/prepare.py --download
    python data/cub/prepare.py --archive CUB_200_2011.tgz

To resume a killed run, run the same command again; it skips finished classes.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import archive

# Source: CaltechDATA's record 65de6-vp158; torchmeta 1.8 has the same checksum.
PUBLISHED = archive.Published(
    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz", "97eceeb196236b17998738112f37df78"
)
SIZE = (84, 84)  # the input of Chen et al.'s four-layer network
CLASS_LISTS = HERE.parent / "splits" / "cub.json"
EXPECTED = {"train classes": 100, "val classes": 50, "test classes": 50, "images": 11_788}
LAYOUT = re.compile(r"(?:.*/)?images/(?P<label>\d{3}\.\w[^/]*)/(?P<name>\w[^/]*\.jpg)")


def find(sources: Iterable[Path]) -> dict[str, archive.Images]:
    """Return the photographs images/<NNN.Class>/*.jpg by class, in the archives' order."""
    photographs: dict[str, archive.Images] = defaultdict(dict)
    for source in sources:
        matches = [(LAYOUT.fullmatch(path), file) for path, file in archive.list_files(source).items()]
        if not any(match for match, _ in matches):
            raise archive.InputError(
                f"{source}: has no images/001.Black_footed_Albatross/*.jpg etc.; give the CUB archive"
            )
        for match, file in matches:
            if match:
                photographs[match["label"]][match["name"]] = file
    return photographs


def main() -> None:
    args = archive.arguments(__doc__, HERE, PUBLISHED, photographs=True)
    images = find(args.archive)
    classes = archive.by_lists(images, CLASS_LISTS, class_size=1)
    classes = archive.refuse_missing(classes, args.allow_missing)
    # Keep the archive's order, because a compressed tar is read sequentially.
    position = {label: i for i, label in enumerate(images)}
    classes.sort(key=lambda entry: position[entry.folder.rpartition("/")[2]])
    archive.write_classes(classes, args.out, args.short_side or SIZE, ".png", EXPECTED, whole=not args.allow_missing)


if __name__ == "__main__":
    archive.run(main)
