"""Augmentation of photographs as mmfewshot's: random crops, flips and colours in training, a centre crop at test.

A photograph is kept whole, in a square, with its aspect (width / height): a crop of it is a box of that square, in
parts of its width and height. What is random is made of random words, so it is a pure function of what those are made
of.
Source: open-mmlab/mmfewshot, configs/classification/maml, and the pipelines of mmcls that they name.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import numpy as np
from PIL import Image, ImageEnhance

AREA = 0.08, 1.0  # of a crop, as a part of the photograph
RATIO = 3 / 4, 4 / 3  # width / height of a crop
ATTEMPTS = 10  # crops that are tried; where none lies in the photograph, the largest in its middle is taken
COLOURS = 0.6, 1.4  # factors of brightness, contrast and saturation
ENHANCED = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
ORDERS = list(permutations(range(3)))
SHORT_SIDE = 1.15  # of a photograph at test, in sizes of the crop, rounded down
# Of red, green and blue, 0 to 1: ImageNet's.
MEAN = np.array([123.675, 116.28, 103.53], np.float32) / 255
STD = np.array([58.395, 57.12, 57.375], np.float32) / 255

PARTS = 32  # of a call's images, which the threads share
WORDS = 2 * ATTEMPTS + 2 + 1 + 3 + 1  # random words of an image: crops, place, flip, colours and their order


def random_crops(
    pixels: np.ndarray, aspects: np.ndarray, words: np.ndarray, size: tuple[int, int], threads: int | None = None
) -> np.ndarray:
    """Crops photographs at random, flips half of them, and changes their colours.

    Args: uint8 [n, S, S, 3]; [n]; uint64 [n, WORDS]; height and width of a crop; threads that share the work, None: as
    many as Python thinks right for this machine.
    Returns uint8 [n, height, width, 3].
    """
    uniform = (words >> np.uint64(11)) * 2.0**-53  # [0, 1)
    boxes = random_boxes(uniform[:, : 2 * ATTEMPTS + 2], aspects)
    flips = uniform[:, -5] < 0.5
    factors = COLOURS[0] + (COLOURS[1] - COLOURS[0]) * uniform[:, -4:-1]
    orders = (6 * uniform[:, -1]).astype(int)

    def one(i):
        image = _cropped(pixels[i], boxes[i], size)
        if flips[i]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for which in ORDERS[orders[i]]:
            image = ENHANCED[which](image).enhance(factors[i, which])
        return np.asarray(image)

    return _stacked(one, len(pixels), size, threads)


def centre_crops(
    pixels: np.ndarray, aspects: np.ndarray, size: tuple[int, int], threads: int | None = None
) -> np.ndarray:
    """Crops the middle of photographs, of which the short side is SHORT_SIDE times the crop's. As random_crops."""
    boxes = centre_boxes(aspects, size)
    return _stacked(lambda i: np.asarray(_cropped(pixels[i], boxes[i], size)), len(pixels), size, threads)


def normalised(x: np.ndarray) -> np.ndarray:
    """Makes of colours of 0 to 1 what the network takes: less MEAN, and divided by STD."""
    return (x - MEAN) / STD


def colours(x: np.ndarray) -> np.ndarray:
    """Makes colours of 0 to 1 of what `normalised` gives."""
    return x * STD + MEAN


def random_boxes(uniform: np.ndarray, aspects: np.ndarray) -> np.ndarray:
    """Random boxes of photographs, [n, 4]: left, top, right, bottom, 0 to 1. uniform: [n, 2 * ATTEMPTS + 2], 0 to 1."""
    area = AREA[0] + (AREA[1] - AREA[0]) * uniform[:, :ATTEMPTS]
    low, high = np.log(RATIO)
    ratio = np.exp(low + (high - low) * uniform[:, ATTEMPTS : 2 * ATTEMPTS])
    # Where a photograph is 1 high and `aspect` wide.
    width = np.sqrt(area * aspects[:, None] * ratio)
    height = width / ratio
    inside = (width <= aspects[:, None]) & (height <= 1)
    first = np.arange(len(aspects)), inside.argmax(1)
    found = inside.any(1)
    width = np.where(found, width[first], np.minimum(aspects, RATIO[1])) / aspects
    height = np.where(found, height[first], np.minimum(1, aspects / RATIO[0]))
    place = np.where(found[:, None], uniform[:, -2:], 0.5)
    left, top = place[:, 0] * (1 - width), place[:, 1] * (1 - height)
    return np.stack([left, top, left + width, top + height], 1)


def centre_boxes(aspects: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The boxes of centre_crops, as random_boxes gives them."""
    short = np.array([int(SHORT_SIDE * side) for side in size])
    height, width = (side / max(short) for side in size)  # of a photograph whose short side is 1
    width, height = width / np.maximum(aspects, 1), height * np.minimum(aspects, 1)
    left, top = (1 - width) / 2, (1 - height) / 2
    return np.stack([left, top, left + width, top + height], 1)


def _cropped(pixels, box, size):
    """The box of a photograph, by Pillow's bilinear filter, which averages where it makes smaller."""
    side = len(pixels)
    box = np.clip(box * side, 0, side)
    return Image.fromarray(pixels).resize(size[::-1], Image.BILINEAR, tuple(box.tolist()))


def _stacked(one, count, size, threads):
    """one(i) of all images, a part of them in each thread."""
    stacked = np.empty((count, *size, 3), np.uint8)

    def some(part):
        for i in part:
            stacked[i] = one(i)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, np.array_split(np.arange(count), min(count, PARTS) or 1)))
    return stacked
