"""MiniImagenet for few-shot learning: 84x84 RGB photographs in {train,val,test}/<label>/.

As in the original, with the 60,000 photographs in images/ in this folder, and Ravi & Larochelle's train.csv, val.csv
and test.csv next to images/:

    cd data/miniImagenet && python proc_images.py

From an archive of the photographs. Without the csv files, the first nine characters of a photograph's name are its
class, and data/splits/miniimagenet.json gives the split of each class:

    python data/miniImagenet/proc_images.py --images images.zip

From ImageNet's training set (ILSVRC 2012), as a folder of <wnid>/ or <wnid>.tar, or as the published archive. The csv
files number the images of each class, up to 1,300, but do not define the numbers. As in yaoyao-liu/mini-imagenet-tools,
image 5 of a class is the fifth when sorted by ImageNet's numbers. Without the csv files, the first 600 images of each
class are used, which are not the published ones:

    python data/miniImagenet/proc_images.py --imagenet ILSVRC2012_img_train.tar --csv DIR

From the widely shared pickles mini-imagenet-cache-{train,val,test}.pkl, whose 84x84 images are saved losslessly as PNG:

    python data/miniImagenet/proc_images.py --pickles DIR

To resume a killed run, run the same command again; it skips finished classes.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import archive

SIZE = (84, 84)  # cbfinn/maml, data/miniImagenet/proc_images.py
CLASS_SIZE = 600  # Ravi & Larochelle, ICLR 2017; so are the numbers in EXPECTED
EXPECTED = archive.published_counts(train=(64, 38_400), val=(16, 9_600), test=(20, 12_000))
CLASS_LISTS = HERE.parent / "splits" / "miniimagenet.json"
CSV_LINE = re.compile(r"([^/\\,.\0][^/\\,\0]*),([^/\\,.\0][^/\\,\0]*)")  # no paths: they become names in --out

Photographs = dict[str, archive.File]  # file name -> where to read it


def find_imagenet(source: Path) -> Photographs:
    """Return ImageNet's photographs of the 100 classes, named as in the csv files: <wnid><rank in its class>.jpg."""
    lists = json.loads(CLASS_LISTS.read_text())
    places = archive.imagenet(source)
    named: Photographs = {}
    for wnid in (wnid for split in archive.SPLITS for wnid in lists[split] if wnid in places):
        photographs = archive.photographs(places[wnid])
        numbers = {}
        for name, file in photographs.items():
            if not (match := re.fullmatch(rf"{wnid}_(\d+)\.JPEG", name)):
                raise archive.InputError(f"{file}: is not named {wnid}_<number>.JPEG as in ImageNet; move it away")
            numbers[int(match[1])] = file
        for rank, number in enumerate(sorted(numbers), start=1):
            named[f"{wnid}{rank:08}.jpg"] = numbers[number]
    archive.say("Images are numbered by rank in their ImageNet class; the csv files do not define their numbers.")
    return named


def classes_of_csv(path: Path, photographs: Photographs) -> list[archive.Class]:
    """Return the classes of Ravi & Larochelle's <split>.csv: a header `filename,label`, then a line per image."""
    lines = path.read_text("utf-8", "replace").splitlines()
    if lines[:1] != ["filename,label"]:
        raise archive.InputError(f"{path}: does not begin with the line filename,label; fetch it again")
    names = defaultdict(list)
    for number, line in enumerate(lines[1:], start=2):
        if not (match := CSV_LINE.fullmatch(line)):
            raise archive.InputError(
                f"{path}: line {number}, {line[:60]!r}, is not <file name>,<label>; fetch it again"
            )
        names[match[2]].append(match[1])
    return [
        archive.Class(
            folder=f"{path.stem}/{label}",
            images={name: photographs[name] for name in files if name in photographs},
            missing=sum(name not in photographs for name in files),
        )
        for label, files in names.items()
    ]


def classes_by_name(photographs: Photographs) -> list[archive.Class]:
    """Return the classes of data/splits/miniimagenet.json. The first nine characters of an image's name are its class.

    If a class has more than 600 images, use the first 600 by name, and print a line.
    """
    images: dict[str, archive.Images] = defaultdict(dict)
    left_out = 0
    for name, file in sorted(photographs.items()):
        if len(images[name[:9]]) < CLASS_SIZE:
            images[name[:9]][name] = file
        else:
            left_out += 1
    if left_out:
        archive.say(
            f"left out {left_out:,} images after the first {CLASS_SIZE} of their class; the csv files choose others"
        )
    return archive.by_lists(images, CLASS_LISTS, CLASS_SIZE)


def find_classes(photographs: Photographs, csv_folder: Path | None) -> list[archive.Class]:
    """Return the classes in the csv files, or by image names if HERE, the default folder, lacks csv files."""
    csv_files = [(csv_folder or HERE) / f"{split}.csv" for split in archive.SPLITS]
    missing = [path for path in csv_files if not path.is_file()]
    if csv_folder is None and missing == csv_files:
        archive.say(f"no csv files in {HERE}; using the images' names and {CLASS_LISTS}")
        return classes_by_name(photographs)
    if missing:
        raise archive.InputError(f"{missing[0]}: no such file; provide train.csv, val.csv and test.csv")
    return [entry for path in csv_files for entry in classes_of_csv(path, photographs)]


def classes_of_pickles(folder: Path) -> list[archive.Class]:
    """Return the classes of mini-imagenet-cache-{train,val,test}.pkl.

    Each is a dict with image_data, uint8 [n, 84, 84, 3], and class_dict, WordNet ID -> list of indices. Images are
    named by their index.
    """
    images: dict[str, archive.Images] = {}
    for split in archive.SPLITS:
        path = folder / f"mini-imagenet-cache-{split}.pkl"
        cache = archive.unpickle(path)
        try:
            pixels = cache["image_data"]
            if pixels.dtype.name != "uint8" or pixels.shape[1:] != (*SIZE, 3):
                raise ValueError(f"image_data is {pixels.dtype} {pixels.shape}")
            for wnid, indices in cache["class_dict"].items():
                images[wnid] = {f"{int(index):05}": pixels[int(index)] for index in indices}
        except Exception as error:  # the pickle may have any structure
            raise archive.InputError(f"{path}: is not a MiniImagenet cache ({error}); fetch it again") from error
    return archive.by_lists(images, CLASS_LISTS, CLASS_SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    images_help = "folder or archive of the photographs (default: images/ in the script's folder)"
    source.add_argument("--images", type=Path, default=HERE / "images", help=images_help)
    source.add_argument("--imagenet", type=Path, help="folder or archive of ImageNet's training set")
    source.add_argument("--pickles", type=Path, help="folder of mini-imagenet-cache-{train,val,test}.pkl")
    parser.add_argument("--csv", type=Path, help="folder of the csv files (default: the script's folder)")
    parser.add_argument("--out", type=Path, default=HERE, help=archive.OUT_HELP)
    parser.add_argument("--lossless", action="store_true", help="save as PNG; published results use JPEG")
    parser.add_argument("--allow_missing", action="store_true", help="continue if classes or images are missing")
    parser.add_argument("--short_side", type=archive.short_side, help=archive.SHORT_SIDE_HELP)
    args = parser.parse_args()
    if args.pickles and args.short_side:
        parser.error("--short_side: the pickles contain 84x84 images, not photographs; remove the flag")
    if args.pickles and args.csv:
        parser.error("--csv: the pickles already define the classes; remove the flag")
    archive.claim(args.out, HERE)
    if args.pickles:
        classes = classes_of_pickles(args.pickles)
    else:
        photographs = find_imagenet(args.imagenet) if args.imagenet else archive.photographs(args.images)
        classes = find_classes(photographs, args.csv)
    # Differs: the original resizes and moves the photographs in images/; we leave them unchanged.
    suffix = ".png" if args.lossless or args.pickles else ".jpg"  # JPEG at Pillow's default quality, as in the original
    classes = archive.refuse_missing(classes, args.allow_missing)
    archive.write_classes(classes, args.out, args.short_side or SIZE, suffix, EXPECTED)


if __name__ == "__main__":
    archive.run(main)
