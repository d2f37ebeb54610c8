"""MiniImagenet for few-shot learning: 84x84 RGB photographs in {train,val,test}/<label>/.

As in the original, in this folder, with the 60,000 photographs in images/ and, beside it, Ravi & Larochelle's
train.csv, val.csv and test.csv:

    cd data/miniImagenet && python proc_images.py

Or from anywhere, from an archive of the photographs. Without the csv files the first nine characters of a
photograph's name tell its class, and data/splits/miniimagenet.json the class's split:

    python data/miniImagenet/proc_images.py --images images.zip

A run that was killed is simply started again: finished classes are skipped.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import archive

SIZE = (84, 84)  # cbfinn/maml, data/miniImagenet/proc_images.py
CLASSES = {"train": 64, "val": 16, "test": 20}  # Ravi & Larochelle, ICLR 2017
CLASS_SIZE = 600
CLASS_LISTS = HERE.parent / "splits" / "miniimagenet.json"
CSV_LINE = re.compile(r"([^/\\,.][^/\\,]*),([^/\\,.][^/\\,]*)")  # plain names: they become paths under --out

Photographs = dict[str, archive.File]  # file name -> where to read it


class Class(NamedTuple):
    folder: str  # train/n01532829
    images: Photographs
    missing: int  # images that it should have besides


def find(source: Path) -> Photographs:
    """The .jpg photographs of a folder or zip archive, at any depth; two of one name are an error."""
    found: Photographs = {}
    for path, file in (archive.files(source) if source.exists() else {}).items():
        name = path.rpartition("/")[2]
        if name.startswith(".") or not name.lower().endswith((".jpg", ".jpeg")):
            continue
        if name in found:
            archive.fail(f"{found[name]} and {file} have one name: leave only one of them in {source}")
        found[name] = file
    if not found:
        archive.fail(f"no .jpg images in {source}: put the 60,000 there, or say where with --images")
    return found


def classes_of_csv(path: Path, photographs: Photographs) -> list[Class]:
    """The classes of Ravi & Larochelle's <split>.csv: a header `filename,label`, then a line an image."""
    lines = path.read_text("utf-8", errors="replace").splitlines()
    if lines[:1] != ["filename,label"]:
        archive.fail(f"{path} does not begin with the line filename,label: fetch it again")
    names = defaultdict(list)
    for number, line in enumerate(lines[1:], start=2):
        if not (match := CSV_LINE.fullmatch(line)):
            archive.fail(f"{path}, line {number}: {line[:60]!r} is no file name and label: fetch it again")
        names[match[2]].append(match[1])
    return [
        Class(
            folder=f"{path.stem}/{label}",
            images={name: photographs[name] for name in listed if name in photographs},
            missing=sum(name not in photographs for name in listed),
        )
        for label, listed in names.items()
    ]


def classes_by_name(photographs: Photographs) -> list[Class]:
    """The classes of data/splits/miniimagenet.json; a name's first nine characters are the image's class."""
    images: dict[str, Photographs] = defaultdict(dict)
    for name, file in photographs.items():
        images[name[:9]][name] = file
    lists = json.loads(CLASS_LISTS.read_text())
    return [
        Class(f"{split}/{label}", images[label], missing=max(0, CLASS_SIZE - len(images[label])))
        for split in CLASSES
        for label in lists[split]
    ]


def find_classes(photographs: Photographs, csv_folder: Path | None) -> list[Class]:
    """The classes by the csv files, or, if no folder is given and none are here, by the images' names."""
    csv_files = [(csv_folder or HERE) / f"{split}.csv" for split in CLASSES]
    absent = [path for path in csv_files if not path.is_file()]
    if csv_folder is None and absent == csv_files:
        print(f"no csv files in {HERE}: classes by the images' names and {CLASS_LISTS}")
        return classes_by_name(photographs)
    if absent:
        archive.fail(f"{absent[0]} is not there: all of train.csv, val.csv and test.csv are needed")
    return [one for path in csv_files for one in classes_of_csv(path, photographs)]


def refuse_to_drop(place: Path, images: Photographs) -> None:
    """Fails where `place` has images that would be gone once `images` replace its content."""
    kept = {Path(name).stem for name in images}
    if lost := sorted(path.name for path in place.glob("*") if path.stem not in kept):
        archive.fail(f"{place} has {len(lost):,} other files, {lost[0]} the first: move that folder away")


def resize(images: Photographs, place: Path, suffix: str, bar: tqdm) -> None:
    """Writes one class's images, RGB, 84x84, into the folder `place`, all at once."""
    with archive.moved_in(place) as folder:
        for name, file in images.items():
            image = archive.read_image(file).convert("RGB").resize(SIZE, Image.LANCZOS)
            image.save((folder / name).with_suffix(suffix))
            bar.update()


def prepare(source: Path, csv_folder: Path | None, out: Path, suffix: str, allow_missing: bool) -> None:
    """Makes <out>/{train,val,test}/<label>/<name><suffix>, 84x84 RGB, of the photographs in `source`.

    suffix: ".jpg" at Pillow's default quality, as the data of the published numbers, or ".png", lossless.
    """
    classes = find_classes(find(source), csv_folder)
    for one in classes:
        if one.missing:
            print(f"{one.folder}: {one.missing:,} images missing")
    missing = sum(one.missing for one in classes)
    classes = [one for one in classes if one.images]
    if missing and not (allow_missing and classes):
        archive.fail(f"{missing:,} images are not in {source}: add them, or go on with --allow_missing")

    for split in CLASSES:
        archive.recover(out / split)
    todo = []
    for one in classes:
        names = [Path(name).with_suffix(suffix).name for name in one.images]
        if not archive.finished(out / one.folder, names, SIZE):
            refuse_to_drop(out / one.folder, one.images)
            todo.append(one)
    print(f"{len(classes)} classes, {len(classes) - len(todo)} of them finished before")

    # Differs: the original resizes the photographs in images/ and moves them; here they stay as they are.
    with tqdm(total=sum(len(one.images) for one in todo), unit="image", disable=None) as bar:
        for one in todo:
            resize(one.images, out / one.folder, suffix, bar)

    found, expected = {}, {}
    for split, number in CLASSES.items():
        images = list((out / split).glob(f"[!.]*/*{suffix}"))
        found |= {f"{split} classes": len({path.parent for path in images}), f"{split} images": len(images)}
        expected |= {f"{split} classes": number, f"{split} images": number * CLASS_SIZE}
    archive.print_counts(found, expected)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--images",
        type=Path,
        default=HERE / "images",
        help="folder or zip archive of the photographs (default: images/ in the script's folder)",
    )
    parser.add_argument("--csv", type=Path, help="folder of the csv files (default: script's folder)")
    parser.add_argument("--out", type=Path, default=HERE, help="where to write (default: script's folder)")
    parser.add_argument("--lossless", action="store_true", help="save PNG; the published numbers are on JPEG")
    parser.add_argument("--allow_missing", action="store_true", help="go on without what is missing")
    args = parser.parse_args()
    prepare(args.images, args.csv, args.out, ".png" if args.lossless else ".jpg", args.allow_missing)


if __name__ == "__main__":
    archive.run(main)
