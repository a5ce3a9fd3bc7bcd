"""Rendered rooms whose depth and surfaces are known by construction: ground truth for dense prediction, no download.

A pinhole camera stands in a tiled room with a few balls and boxes on the floor. Each ray is intersected with all of
them in closed form, so the depth of every pixel is exact (to the millimetre of the file), and what is seen there is
known: floor, wall, ceiling, ball or box. What makes depth visible is what makes it visible in photographs: the camera's
height varies little, tiles and stripes have one size in metres, objects stand on the floor, surfaces are shaded by
their angle to a light. No pixel is without a class: where a `scenes` mask has background, these have stuff, and a patch
of plain wall has to be told from a patch of plain floor.

Every test room is seen by a second camera as well, that has moved aside and looks at the same: where a point of the
first view is in the second follows from depth and the two cameras, and whether it is hidden there from the ray to it.

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

from regvit.data.correspondences import Pair, write_pairs
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
ASIDE, AHEAD = (0.4, 0.9), (0.0, 0.5)  # metres that the camera of a second view has moved
LOOKED_AT = 3.5  # metres ahead, the place that both views have in their middle
GRID = 32  # points a side that are looked for in the second view: four a patch of 14 pixels
SAME_POINT = 1e-6  # share of a ray's length by which rounding may put a point before itself

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
    """Builds the source `relief`: `COUNTS` rooms, each from a generator of its own, every test room seen twice.

    The second views come last and have neither mask nor depth: they are for `pairs.csv` alone.
    """
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
    twice = [row for row in rows if row.split == "test"]
    second = [Row(f"{row.image_id}_moved", "", "", "test") for row in twice]

    def rendered(row: Row) -> tuple[Row, View, Pair | None]:
        number = int(row.image_id.removesuffix("_moved").rpartition("_")[2])
        generator = builder.generator(f"relief:{row.split}:{number}")
        if row.depth:
            return row, render(generator), None
        room, camera = furnished(generator)
        moved = camera.moved(builder.generator(f"relief:moved:{number}"))
        pair = Pair(row.image_id.removesuffix("_moved"), row.image_id, room.shared_points(camera, moved))
        return row, room.seen_from(moved, generator), pair

    workers, pairs = os.cpu_count() or 1, []
    for row, view, pair in builder.watched(
        in_order(rendered, [*rows, *second], workers, 4 * workers), len(rows) + len(second)
    ):
        if row.depth:
            Image.fromarray(view.mask).save(builder.folder / row.mask)
            Image.fromarray(view.depth).save(builder.folder / row.depth)
        builder.add(row, Image.fromarray(view.image))
        pairs += [pair] if pair is not None else []
    if pairs:
        write_pairs(builder.folder, pairs)


def render(generator: np.random.Generator, size: int = SIZE) -> View:
    """A random room with objects in it.

    Args:
        size: side of the image, pixels.
    """
    room, camera = furnished(generator)
    return room.seen_from(camera, generator, size)


@dataclass(frozen=True)
class Camera:
    """Where it stands, metres, and by how much it looks down and to the right, radians."""

    origin: Float[np.ndarray, " 3"]
    pitch: float
    yaw: float = 0.0

    def rays(self, size: int) -> Float[np.ndarray, "s s 3"]:
        return camera_rays(size, self.pitch, self.yaw)

    def project(self, points: Points) -> Points:
        """Column and row in an image of side 1, and depth in metres; the inverse of `rays`."""
        x, y, z = (points - self.origin).T
        right, ahead = x * np.cos(self.yaw) - z * np.sin(self.yaw), x * np.sin(self.yaw) + z * np.cos(self.yaw)
        depth = ahead * np.cos(self.pitch) - y * np.sin(self.pitch)
        down = -y * np.cos(self.pitch) - ahead * np.sin(self.pitch)
        return np.stack([(right / depth / HALF_WIDTH + 1) / 2, (down / depth / HALF_WIDTH + 1) / 2, depth], axis=1)

    def moved(self, generator: np.random.Generator) -> Camera:
        """Some steps to a side and ahead, looking back to what is in the middle."""
        side, ahead = generator.choice([-1, 1]) * generator.uniform(*ASIDE), generator.uniform(*AHEAD)
        yaw = -np.arctan2(side, LOOKED_AT) + np.radians(generator.uniform(-5, 5))
        return Camera(self.origin + np.array([side, generator.uniform(-0.1, 0.1), ahead]), self.pitch, float(yaw))


@dataclass(frozen=True)
class Furnished:
    """A room with objects in it and a light."""

    room: Room
    objects: list[Ball | Box]
    light: Float[np.ndarray, " 3"]

    def depths(self, origin: Float[np.ndarray, " 3"], rays: Points) -> Float[np.ndarray, "k n"]:
        """Of each surface along each ray, the room's first."""
        return np.stack([surface.depth(origin, rays) for surface in (self.room, *self.objects)])

    def seen_from(self, camera: Camera, generator: np.random.Generator, size: int = SIZE) -> View:
        """What a camera sees; the generator is of the noise."""
        rays = camera.rays(size * SAMPLES).reshape(-1, 3)
        depths = self.depths(camera.origin, rays)
        nearest = depths.argmin(0)
        depth = depths[nearest, np.arange(len(rays))]
        points = camera.origin + depth[:, None] * rays
        kind, colour = np.empty(len(rays), np.uint8), np.empty((len(rays), 3))
        for i, surface in enumerate((self.room, *self.objects)):
            here = np.flatnonzero(nearest == i)
            seen = surface.look(points[here])
            shade = AMBIENT + (1 - AMBIENT) * np.clip(seen.normal @ self.light, 0, 1)
            kind[here], colour[here] = seen.kind, seen.colour * shade[:, None]
        floor = np.flatnonzero(kind == FLOOR)
        colour[floor] *= _dimming(points[floor], self.objects)[:, None]
        fine = colour.reshape(size, SAMPLES, size, SAMPLES, 3).mean((1, 3))
        image = fine + generator.normal(0, NOISE, fine.shape)
        # No sample lies at the centre of a pixel: truth is that of the one above and left of it, a quarter pixel away.
        depth, kind = (values.reshape(size * SAMPLES, -1)[::SAMPLES, ::SAMPLES] for values in (depth, kind))
        return View(
            image.round().clip(0, 255).astype(np.uint8),
            (depth * 1000).round().astype(np.uint16),
            (kind + 1).astype("u1"),
        )

    def shared_points(self, first: Camera, second: Camera, size: int = SIZE) -> Float[np.ndarray, "m 4"]:
        """Points of a regular grid in the first view that the second one sees too: x, y there and here, pixels.

        A point is hidden where the second camera's ray to it meets something before.
        """
        rays = first.rays(GRID).reshape(-1, 3)
        points = first.origin + self.depths(first.origin, rays).min(0)[:, None] * rays
        x, y, depth = second.project(points).T
        inside = (depth > 0) & (np.minimum(x, y) > 0) & (np.maximum(x, y) < 1)
        towards = (points - second.origin)[inside]
        inside[inside] = self.depths(second.origin, towards).min(0) > 1 - SAME_POINT
        across = (np.arange(GRID) + 0.5) / GRID
        there = np.stack(np.meshgrid(across, across), axis=-1).reshape(-1, 2)
        return size * np.concatenate([there, np.stack([x, y], axis=1)], axis=1)[inside]


def furnished(generator: np.random.Generator) -> tuple[Furnished, Camera]:
    """A random room with objects in it, and the camera that looks into it."""
    origin = np.array([0.0, generator.uniform(*CAMERA_HEIGHT), 0.0])
    camera = Camera(origin, np.radians(generator.uniform(*PITCH)))
    room = Room(
        *(generator.uniform(*span) for span in (ROOM_WIDTH, ROOM_LENGTH, ROOM_HEIGHT)),
        colours=tuple(_two_colours(generator) for _ in range(3)),
    )
    objects = _furnish(room, generator)
    light = _unit(np.array([generator.uniform(-1, 1), generator.uniform(0.6, 1.2), generator.uniform(-1.2, -0.2)]))
    return Furnished(room, objects, light), camera


def camera_rays(size: int, pitch: float, yaw: float = 0.0) -> Float[np.ndarray, "s s 3"]:
    """Directions through the pixels, in the world, each one metre long along the camera's axis.

    Args:
        pitch: radians downwards.
        yaw: radians to the right.
    """
    across = (2 * (np.arange(size) + 0.5) / size - 1) * HALF_WIDTH
    x, down = np.meshgrid(across, across)
    y = -down * np.cos(pitch) - np.sin(pitch)
    z = np.cos(pitch) - down * np.sin(pitch)
    return np.stack([x * np.cos(yaw) + z * np.sin(yaw), y, z * np.cos(yaw) - x * np.sin(yaw)], axis=-1)


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
