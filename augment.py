"""Augmentation of photographs as mmfewshot's: random crops, flips and colours in training, a centre crop at test.

A photograph is kept whole, resized to a square, and its aspect (width / height) is kept beside it. A crop of it is a
box of that square: left, top, right, bottom, from 0 (left, top) to 1. All that is random is made of the words that the
caller gives, so the same words give the same crop.
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
SHORT_SIDE = 1.15  # of a photograph at test, in sizes of the crop; rounded down to pixels: 96 for a crop of 84
# ImageNet's, of red, green and blue, where colours are 0 to 1.
MEAN = np.array([123.675, 116.28, 103.53], np.float32) / 255
STD = np.array([58.395, 57.12, 57.375], np.float32) / 255

PARTS = 32  # of a call's images, which the threads share
WORDS = 2 * ATTEMPTS + 2 + 1 + 3 + 1  # random words of an image: crops, place, flip, colours and their order


def random_crops(pixels: np.ndarray, aspects: np.ndarray, words: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crops photographs at random, flips half of them, and changes their colours.

    Args:
        pixels: uint8 [n, S, S, 3], photographs in squares.
        aspects: [n], width / height of each before it was a square.
        words: uint64 [n, WORDS], random.
        size: height and width of a crop in pixels.
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

    return _stacked(one, len(pixels), size)


def centre_crops(pixels: np.ndarray, aspects: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crops the middle of photographs whose short side is SHORT_SIDE times the crop's. Shapes as in random_crops."""
    boxes = centre_boxes(aspects, size)
    return _stacked(lambda i: np.asarray(_cropped(pixels[i], boxes[i], size)), len(pixels), size)


def normalised(x: np.ndarray) -> np.ndarray:
    """Makes of colours [..., 3] from 0 to 1 what the network takes: less MEAN, and divided by STD."""
    return (x - MEAN) / STD


def colours(x: np.ndarray) -> np.ndarray:
    """Makes colours [..., 3] from 0 to 1 of what `normalised` gives."""
    return x * STD + MEAN


def random_boxes(uniform: np.ndarray, aspects: np.ndarray) -> np.ndarray:
    """Chooses a box in each photograph, as mmcls' RandomResizedCrop.

    Areas are uniform within AREA, and the logarithms of width / height within that of RATIO. The first attempt that
    lies in the photograph is taken.
    Args:
        uniform: [n, 2 * ATTEMPTS + 2], random, 0 to 1: of each attempt its area, then of each its shape, then the place
            of the box, from left to right and from top to bottom.
        aspects: [n], width / height of the photographs.
    Returns [n, 4]: left, top, right, bottom, 0 to 1.
    """
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
    """Finds the boxes of centre_crops, of photographs with these aspects [n]. Returns what random_boxes returns."""
    short = np.array([int(SHORT_SIDE * side) for side in size])
    height, width = (side / max(short) for side in size)  # of a photograph whose short side is 1
    width, height = width / np.maximum(aspects, 1), height * np.minimum(aspects, 1)
    left, top = (1 - width) / 2, (1 - height) / 2
    return np.stack([left, top, left + width, top + height], 1)


def _cropped(pixels, box, size):
    """Cuts a box [4] out of a photograph [S, S, 3], by Pillow's bilinear filter, which averages what it shrinks."""
    side = len(pixels)
    box = np.clip(box * side, 0, side)
    return Image.fromarray(pixels).resize(size[::-1], Image.BILINEAR, tuple(box.tolist()))


def _stacked(one, count, size):
    """Stacks one(i) of all images, uint8 [count, height, width, 3]. Threads share the images, a part at a time."""
    stacked = np.empty((count, *size, 3), np.uint8)

    def some(part):
        for i in part:
            stacked[i] = one(i)

    with ThreadPoolExecutor() as pool:
        list(pool.map(some, np.array_split(np.arange(count), min(count, PARTS) or 1)))
    return stacked
