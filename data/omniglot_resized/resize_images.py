"""Omniglot for few-shot learning: every 105x105 drawing as a 28x28 PNG, <alphabet>/<character>/*.png.

As in the original, in this folder. The copies are replaced, data/omniglot stays as it is:

    cd data/omniglot_resized && cp -r ../omniglot/* . && python resize_images.py

Or from the published archives, from anywhere:

    python data/omniglot_resized/resize_images.py --download
    python data/omniglot_resized/resize_images.py images_background.zip images_evaluation.zip

A run that was killed is simply started again: finished alphabets are skipped.
"""

import argparse
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Container
from pathlib import Path
from typing import NoReturn

from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import archive

ADDRESS = "https://github.com/brendenlake/omniglot/raw/master/python/"
PUBLISHED = (  # the checksums are those that torchvision 0.29 has, datasets/omniglot.py
    archive.Published(f"{ADDRESS}images_background.zip", "68d2efa1b9178cc56df9314c21c6e718"),
    archive.Published(f"{ADDRESS}images_evaluation.zip", "6b91aef0f799c5bb55b94e3f2daec811"),
)
SIZE = (28, 28)  # cbfinn/maml, data/omniglot_resized/resize_images.py
EXPECTED = {"alphabets": 50, "characters": 1_623, "images": 32_460}  # Lake et al., Science 2015
LAYOUT = re.compile(r"(images_\w+/)?(?P<alphabet>[^/.][^/]*)/(?P<image>[^/.][^/]*/[^/.][^/]*\.png)")

Drawings = dict[str, dict[str, archive.File]]  # alphabet -> "character/name.png" -> where to read it


def find(source: Path) -> Drawings:
    """The drawings of a folder or zip archive that lie in [images_.../]<alphabet>/<character>/*.png."""
    found: Drawings = defaultdict(dict)
    for name, file in archive.files(source).items():
        if match := LAYOUT.fullmatch(name):
            found[match["alphabet"]][match["image"]] = file
    return found


def fail_empty(source: Path) -> NoReturn:
    """Ends the program with the layout that was looked for."""
    archive.fail(
        f"{source} has no drawings: <alphabet>/<character>/*.png was expected there, if need be under "
        "images_background/ or images_evaluation/; "
        "copy data/omniglot/* there, or name images_background.zip and images_evaluation.zip"
    )


def resize(images: dict[str, archive.File], place: Path, bar: tqdm) -> None:
    """Writes one alphabet's images, 28x28, into the folder `place`, all at once."""
    with archive.moved_in(place) as folder:
        for name, file in images.items():
            (folder / name).parent.mkdir(exist_ok=True)
            # Pillow resizes the 1-bit drawings by nearest neighbour whatever filter is asked, so they stay
            # binary, as those of the published numbers. Turned grey first they would be another data set.
            archive.read_image(file).resize(SIZE, Image.LANCZOS).save(folder / name)
            bar.update()


def remove_raw_copies(alphabets: Container[str], out: Path) -> None:
    """Removes the finished alphabets' copies under images_background/ and images_evaluation/ in `out`."""
    for group in out.glob("images_*"):
        if group.is_dir() and not group.is_symlink():
            for copy in group.iterdir():
                if copy.name in alphabets and not copy.is_symlink():
                    shutil.rmtree(copy)
            if not any(group.iterdir()):
                group.rmdir()


def prepare(sources: list[Path], out: Path) -> None:
    """Makes <out>/<alphabet>/<character>/*.png, 28x28, of the drawings in the sources and in `out` itself."""
    drawings: Drawings = defaultdict(dict)
    for source in sources:
        found = find(source) or fail_empty(source)
        for alphabet, images in found.items():
            drawings[alphabet] |= images

    out.mkdir(parents=True, exist_ok=True)
    archive.recover(out)
    for alphabet, images in find(out).items():
        drawings[alphabet] = images | drawings[alphabet]
    if not drawings:
        fail_empty(out)

    todo = [name for name in sorted(drawings) if not archive.finished(out / name, drawings[name], SIZE)]
    print(f"{len(drawings)} alphabets, {len(drawings) - len(todo)} of them finished before")
    with tqdm(total=sum(len(drawings[name]) for name in todo), unit="image", disable=None) as bar:
        for alphabet in todo:
            resize(drawings[alphabet], out / alphabet, bar)
    remove_raw_copies(drawings, out)

    ready = find(out).values()
    characters = sum(len({name.split("/")[0] for name in images}) for images in ready)
    found = {"alphabets": len(ready), "characters": characters, "images": sum(map(len, ready))}
    archive.print_counts(found, EXPECTED)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="*", type=Path, help="archives or folders (default: --out itself)")
    parser.add_argument("--download", action="store_true", help=f"fetch the two archives of {ADDRESS} into --out")
    parser.add_argument("--out", type=Path, default=HERE, help="where to write (default: script's folder)")
    args = parser.parse_args()
    fetched = [archive.download(one, args.out) for one in PUBLISHED] if args.download else []
    prepare(args.sources + fetched, args.out)


if __name__ == "__main__":
    archive.run(main)
