"""Rendered rooms whose depth and surfaces are known by construction: ground truth for dense prediction, no download.

A pinhole camera stands in a tiled room with a few balls and boxes on the floor. Each ray is intersected with all of
them in closed form, so the depth of every pixel is exact (to the millimetre of the file), and what is seen there is
known: floor, wall, ceiling, ball or box. What makes depth visible is what makes it visible in photographs: the camera's
height varies little, tiles and stripes have one size in metres, objects stand on the floor, surfaces are shaded by
their angle to a light. No pixel is without a class: where a `scenes` mask has background, these have stuff, and a patch
of plain wall has to be told from a patch of plain floor.

Axes of the world: x right, y up, z ahead, metres; the camera stands at (0, height, 0). Depth is the distance along the
camera's axis, as depth cameras give it, not the length of the ray.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import reduce

import numpy as np
from jaxtyping import Bool, Float, UInt8, UInt16
from PIL import Image

from regvit.data.dataset_builder import DatasetBuilder
from regvit.data.manifest import Row
from regvit.data.prefetch import in_order

SIZE = 224  # pixels
SAMPLES = 2  # rays by pixel and axis, averaged for colour
COUNTS = {"train": 120, "val": 40, "test": 260}
CLASSES = ("floor", "wall", "ceiling", "ball", "box")
FLOOR, WALL, CEILING, BALL, BOX = range(len(CLASSES))
HALF_WIDTH = np.tan(np.radians(60) / 2)  # of the image plane one metre ahead
CAMERA_HEIGHT = (1.35, 1.65)  # metres
PITCH = (2.0, 14.0)  # degrees downwards
ROOM_WIDTH, ROOM_LENGTH, ROOM_HEIGHT = (3.0, 8.0), (3.5, 9.5), (2.4, 3.6)  # metres
OBJECTS = (2, 5)  # fewest and most
RADIUS = (0.15, 0.5)  # of an object's footprint, metres
TILE, STRIPE = 0.5, 0.15  # metres: one size everywhere, as tiles, doors and people are in photographs
AMBIENT = 0.45  # share of the light that falls on every surface
NOISE = 3.0  # standard deviation of the pixel noise, grey levels

Points = Float[np.ndarray, "n 3"]


@dataclass(frozen=True)
class View:
    """A rendered image and what is true of it.

    Attributes:
        image: RGB.
        depth: millimetres.
        mask: class index + 1, as in `CLASSES`.
    """

    image: UInt8[np.ndarray, "s s 3"]
    depth: UInt16[np.ndarray, "s s"]
    mask: UInt8[np.ndarray, "s s"]


@dataclass(frozen=True)
class Seen:
    """What some points of a surface look like: class index, colour before shading (0 to 255), unit normal."""

    kind: UInt8[np.ndarray, " n"]
    colour: Points
    normal: Points


@dataclass(frozen=True)
class Room:
    """The inside of a box that reaches one metre behind the camera; `colours` of floor, walls and ceiling."""

    width: float
    length: float
    height: float
    colours: tuple[Float[np.ndarray, "2 3"], ...]

    @property
    def centre(self) -> Float[np.ndarray, " 3"]:
        return np.array([0.0, self.height / 2, (self.length - 1) / 2])

    @property
    def half(self) -> Float[np.ndarray, " 3"]:
        return np.array([self.width, self.height, self.length + 1]) / 2

    def depth(self, origin: Float[np.ndarray, " 3"], rays: Points) -> Float[np.ndarray, " n"]:
        return meet_box(origin - self.centre, rays, self.half)[1]

    def look(self, points: Points) -> Seen:
        """Floor and ceiling are tiled, walls are of bricks."""
        face, normal = _faces(points - self.centre, self.half)
        x, y, z = points.T
        kind = np.where(face != 1, WALL, np.where(y < self.height / 2, FLOOR, CEILING)).astype(np.uint8)
        tiles = (np.floor(x / TILE) + np.floor(z / TILE)) % 2 == 0
        bricks = _bricks(np.where(face == 0, z, x), y)
        first = np.where(kind == WALL, bricks, tiles)
        return Seen(kind, np.stack(self.colours)[kind, np.where(first, 0, 1)], -normal)


@dataclass(frozen=True)
class Ball:
    """A striped ball that lies on the floor."""

    x: float
    z: float
    radius: float
    colours: Float[np.ndarray, "2 3"]

    @property
    def centre(self) -> Float[np.ndarray, " 3"]:
        return np.array([self.x, self.radius, self.z])

    def depth(self, origin: Float[np.ndarray, " 3"], rays: Points) -> Float[np.ndarray, " n"]:
        return meet_ball(origin - self.centre, rays, self.radius)

    def look(self, points: Points) -> Seen:
        stripes = np.floor((points[:, 1] + 0.3 * points[:, 0]) / STRIPE) % 2 == 0
        normal = (points - self.centre) / self.radius
        return Seen(np.full(len(points), BALL, np.uint8), self.colours[np.where(stripes, 0, 1)], normal)


@dataclass(frozen=True)
class Box:
    """A striped box on the floor, turned about the vertical by `angle` (radians); its footprint lies in the radius."""

    x: float
    z: float
    radius: float
    height: float
    angle: float
    colours: Float[np.ndarray, "2 3"]

    @property
    def centre(self) -> Float[np.ndarray, " 3"]:
        return np.array([self.x, self.height / 2, self.z])

    @property
    def half(self) -> Float[np.ndarray, " 3"]:
        return np.array([self.radius / np.sqrt(2), self.height / 2, self.radius / np.sqrt(2)])

    @property
    def turn(self) -> Float[np.ndarray, "3 3"]:
        """From the world's axes to the box's own."""
        c, s = np.cos(self.angle), np.sin(self.angle)
        return np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])

    def depth(self, origin: Float[np.ndarray, " 3"], rays: Points) -> Float[np.ndarray, " n"]:
        return meet_box(self.turn @ (origin - self.centre), rays @ self.turn.T, self.half)[0]

    def look(self, points: Points) -> Seen:
        _, normal = _faces((points - self.centre) @ self.turn.T, self.half)
        stripes = np.floor(points[:, 1] / STRIPE) % 2 == 0
        return Seen(np.full(len(points), BOX, np.uint8), self.colours[np.where(stripes, 0, 1)], normal @ self.turn)


def relief(builder: DatasetBuilder, rest: str) -> None:
    """Builds the source `relief`: `COUNTS` rooms, each from a generator of its own."""
    builder.refuse_classes()
    builder.credit_to("images", "rendered by regvit.data.synthetic.rooms", "MIT", "this project")
    builder.classes = CLASSES
    for name in ("depth", "masks"):
        (builder.folder / name).mkdir()
    rows = builder.limit([
        Row(name := f"relief_{split}_{i:03}", "", "", split, mask=f"masks/{name}.png", depth=f"depth/{name}.png")
        for split, count in COUNTS.items()
        for i in range(count)
    ])  # fmt: skip

    def rendered(row: Row) -> tuple[Row, View]:
        number = int(row.image_id.rpartition("_")[2])
        return row, render(builder.generator(f"relief:{row.split}:{number}"))

    workers = os.cpu_count() or 1
    for row, view in builder.watched(in_order(rendered, rows, workers, 4 * workers), len(rows)):
        Image.fromarray(view.mask).save(builder.folder / row.mask)
        Image.fromarray(view.depth).save(builder.folder / row.depth)
        builder.add(row, Image.fromarray(view.image))


def render(generator: np.random.Generator, size: int = SIZE) -> View:
    """A random room with objects in it.

    Args:
        size: side of the image, pixels.
    """
    origin = np.array([0.0, generator.uniform(*CAMERA_HEIGHT), 0.0])
    rays = camera_rays(size * SAMPLES, np.radians(generator.uniform(*PITCH))).reshape(-1, 3)
    room = Room(
        *(generator.uniform(*span) for span in (ROOM_WIDTH, ROOM_LENGTH, ROOM_HEIGHT)),
        colours=tuple(_two_colours(generator) for _ in range(3)),
    )
    objects = _furnish(room, generator)
    light = _unit(np.array([generator.uniform(-1, 1), generator.uniform(0.6, 1.2), generator.uniform(-1.2, -0.2)]))
    surfaces = [room, *objects]
    depths = np.stack([surface.depth(origin, rays) for surface in surfaces])
    nearest = depths.argmin(0)
    depth = depths[nearest, np.arange(len(rays))]
    points = origin + depth[:, None] * rays
    kind, colour = np.empty(len(rays), np.uint8), np.empty((len(rays), 3))
    for i, surface in enumerate(surfaces):
        here = np.flatnonzero(nearest == i)
        seen = surface.look(points[here])
        shade = AMBIENT + (1 - AMBIENT) * np.clip(seen.normal @ light, 0, 1)
        kind[here], colour[here] = seen.kind, seen.colour * shade[:, None]
    floor = np.flatnonzero(kind == FLOOR)
    colour[floor] *= _dimming(points[floor], objects)[:, None]
    fine = colour.reshape(size, SAMPLES, size, SAMPLES, 3).mean((1, 3))
    image = fine + generator.normal(0, NOISE, fine.shape)
    # No sample lies at the centre of a pixel: truth is that of the one above and left of it, a quarter pixel away.
    depth, kind = (values.reshape(size * SAMPLES, -1)[::SAMPLES, ::SAMPLES] for values in (depth, kind))
    return View(
        image.round().clip(0, 255).astype(np.uint8), (depth * 1000).round().astype(np.uint16), (kind + 1).astype("u1")
    )


def camera_rays(size: int, pitch: float) -> Float[np.ndarray, "s s 3"]:
    """Directions through the pixels, in the world, each one metre long along the camera's axis.

    Args:
        pitch: radians downwards.
    """
    across = (2 * (np.arange(size) + 0.5) / size - 1) * HALF_WIDTH
    x, down = np.meshgrid(across, across)
    y = -down * np.cos(pitch) - np.sin(pitch)
    z = np.cos(pitch) - down * np.sin(pitch)
    return np.stack([x, y, z], axis=-1)


def meet_ball(origin: Float[np.ndarray, " 3"], rays: Points, radius: float) -> Float[np.ndarray, " n"]:
    """Lengths of rays, in multiples of each, until they enter a ball around 0; infinite where they miss it.

    |origin + t ray|² = radius², the smaller root.
    """
    a, b, c = np.einsum("nd,nd->n", rays, rays), rays @ origin, origin @ origin - radius**2
    square = b**2 - a * c
    t = (-b - np.sqrt(np.maximum(square, 0))) / a
    return np.where((square > 0) & (t > 0), t, np.inf)


def meet_box(
    origin: Float[np.ndarray, " 3"], rays: Points, half: Float[np.ndarray, " 3"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Lengths of rays, in multiples of each, until they enter and leave a box around 0; infinite where they miss it.

    Args:
        half: of the lengths of its edges, which lie along the axes.
    """
    with np.errstate(divide="ignore"):
        one, other = (-half - origin) / rays, (half - origin) / rays
    # Axis by axis: numpy's own reduction over an axis of three takes five times as long.
    enter, leave = reduce(np.maximum, np.minimum(one, other).T), reduce(np.minimum, np.maximum(one, other).T)
    hit = (enter < leave) & (leave > 0)
    return np.where(hit, enter, np.inf), np.where(hit, leave, np.inf)


def _furnish(room: Room, generator: np.random.Generator) -> list[Ball | Box]:
    """Objects in view, none in another; the first places tried may leave room for fewer than were drawn."""
    wanted, objects = int(generator.integers(OBJECTS[0], OBJECTS[1] + 1)), []
    for _ in range(4 * wanted):
        z, radius = generator.uniform(1.6, room.length - 0.6), generator.uniform(*RADIUS)
        x = generator.uniform(-1, 1) * min(room.width / 2 - 0.5, 0.9 * HALF_WIDTH * z)
        height, angle = generator.uniform(0.3, 1.4), generator.uniform(0, np.pi / 2)
        colours, is_ball = _two_colours(generator), generator.random() < 0.5
        if len(objects) < wanted and all(np.hypot(x - o.x, z - o.z) > radius + o.radius for o in objects):
            objects.append(Ball(x, z, radius, colours) if is_ball else Box(x, z, radius, height, angle, colours))
    return objects


def _faces(points: Points, half: Float[np.ndarray, " 3"]) -> tuple[np.ndarray, Points]:
    """Of points on a box around 0: the axis across which each one's face lies, and the normal outwards."""
    face = (np.abs(points) / half).argmax(-1)
    return face, np.sign(np.take_along_axis(points, face[:, None], -1)) * np.eye(3)[face]


def _bricks(along: Float[np.ndarray, " n"], up: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Where a wall shows brick rather than joint; every other course is shifted by half a brick."""
    course = np.floor(up / (TILE / 2))
    return ((up / (TILE / 2)) % 1 > 0.08) & ((along / TILE + (course % 2) / 2) % 1 > 0.04)


def _dimming(points: Points, objects: list[Ball | Box]) -> Float[np.ndarray, " n"]:
    """Factor of the light on the floor, which is darker under and around what stands on it."""
    factor = np.ones(len(points))
    for one in objects:
        distance = (points[:, 0] - one.x) ** 2 + (points[:, 2] - one.z) ** 2
        factor -= 0.5 * np.exp(-distance / one.radius**2)
    return factor.clip(0.2, 1)


def _two_colours(generator: np.random.Generator) -> Float[np.ndarray, "2 3"]:
    """A light colour and a darker one of the same hue."""
    light = generator.uniform(110, 250, 3)
    return np.stack([light, light * generator.uniform(0.45, 0.75)])


def _unit(vector: Float[np.ndarray, " 3"]) -> Float[np.ndarray, " 3"]:
    return vector / np.linalg.norm(vector)
