import numpy as np
import pytest
from PIL import Image

from regvit.data.correspondences import read_pairs
from regvit.data.dense_labels import read_depth
from regvit.data.synthetic import rooms as relief
from regvit.data.synthetic.rooms import CLASSES, camera_rays, meet_ball, meet_box, render


def rendered(seed, size=64):
    return render(np.random.default_rng(seed), size)


def test_every_pixel_has_a_class_and_a_depth_that_a_room_can_have():
    seen = set()
    for seed in range(12):
        view = rendered(seed)
        seen |= set(np.unique(view.mask).tolist())
        assert view.depth.min() > 500 and view.depth.max() < 10_000  # millimetres
        assert view.image.dtype == np.uint8 and view.image.shape == (64, 64, 3)
    assert seen == set(range(1, len(CLASSES) + 1))


def test_floor_and_ceiling_lie_where_the_camera_says(monkeypatch):
    """Depth of a floor pixel from the pinhole equations alone, without rays or boxes."""
    monkeypatch.setattr(relief, "CAMERA_HEIGHT", (1.5, 1.5))
    monkeypatch.setattr(relief, "PITCH", (10.0, 10.0))
    monkeypatch.setattr(relief, "ROOM_HEIGHT", (3.0, 3.0))
    monkeypatch.setattr(relief, "OBJECTS", (0, 0))
    view = rendered(3)
    pitch = np.radians(10)
    sample = (np.arange(64) * 2 + 0.5) / 128  # the upper left one of four
    down = (2 * sample - 1) * np.tan(np.radians(30))
    slope = np.sin(pitch) + down * np.cos(pitch)  # metres downwards by metre of depth
    for kind, height in ((1, 1.5), (3, -1.5)):
        rows = np.flatnonzero((view.mask == kind).any(1))
        assert len(rows)
        for row in rows:
            depth = view.depth[row][view.mask[row] == kind]
            np.testing.assert_allclose(depth, 1000 * height / slope[row], atol=0.6)


def test_objects_hide_what_is_behind_them_and_nothing_else(monkeypatch):
    furnished = [rendered(seed) for seed in range(6)]
    monkeypatch.setattr(relief, "OBJECTS", (0, 0))
    for seed, view in enumerate(furnished):
        empty, objects = rendered(seed), view.mask >= 4
        assert objects.any() and not (empty.mask >= 4).any()
        assert (view.depth[objects] < empty.depth[objects]).all()
        assert np.array_equal(view.depth[~objects], empty.depth[~objects])
        assert np.array_equal(view.mask[~objects], empty.mask[~objects])


def test_a_ray_meets_a_ball_where_plain_geometry_says():
    rays = np.array([[0.0, 0, 1], [0, 0, 2], [1, 0, 0], [0, 0.6, 0.8]])
    origin = np.array([0.0, 0, -5])
    found = meet_ball(origin, rays, 2.0)
    assert found[0] == pytest.approx(3.0) and found[1] == pytest.approx(1.5)
    assert np.isinf(found[2]) and np.isinf(found[3])  # to the side, and past it at a distance of 3


def test_a_ray_enters_and_leaves_a_box_where_plain_geometry_says():
    half = np.array([1.0, 2.0, 3.0])
    rays = np.array([[0.0, 0, 1], [0, 1, 0], [1.0, 0, 1.0]])
    enter, leave = meet_box(np.array([0.0, 0, -10]), rays, half)
    assert (enter[0], leave[0]) == (7, 13)
    assert np.isinf(enter[1:]).all() and np.isinf(leave[1:]).all()
    assert meet_box(np.array([0.5, 0.0, 0.0]), np.array([[1.0, 0.1, 0.2]]), half)[1][0] == pytest.approx(0.5)


def test_the_camera_looks_straight_ahead_and_down_by_its_pitch():
    rays = camera_rays(101, np.radians(20))
    np.testing.assert_allclose(rays[50, 50], [0, -np.sin(np.radians(20)), np.cos(np.radians(20))], atol=1e-12)
    axis = rays[50, 50]
    np.testing.assert_allclose(rays @ axis, 1.0)  # one metre along the axis, whatever the pixel
    assert rays[0, 50, 1] > rays[100, 50, 1] and rays[50, 0, 0] < 0 < rays[50, 100, 0]


@pytest.fixture
def few_and_small(monkeypatch):
    monkeypatch.setattr(relief, "COUNTS", {"train": 3, "val": 2, "test": 2})
    monkeypatch.setattr(relief, "render", lambda generator: render(generator, 32))


@pytest.mark.usefixtures("few_and_small")
def test_the_set_has_depth_and_masks_of_every_image_and_is_drawn_from_the_seed(make):
    dataset = make("relief", "a").dataset
    assert [row.split for row in dataset.rows] == ["train"] * 3 + ["val"] * 2 + ["test"] * 4
    assert dataset.classes == CLASSES and not dataset.rows[7].mask and not dataset.rows[7].depth
    for row in dataset.rows[:7]:
        depth = read_depth(dataset.root / row.depth)
        mask = np.asarray(Image.open(dataset.root / row.mask))
        assert depth.shape == mask.shape == (32, 32)
        assert depth.min() > 0.5 and depth.max() < 10 and set(np.unique(mask)) <= set(range(1, 6))
    assert make("relief", "b").dataset.digest == dataset.digest
    assert make("relief", "c", seed=1).dataset.digest != dataset.digest


@pytest.mark.usefixtures("few_and_small")
def test_every_test_room_has_a_second_view_and_points_that_both_show(make, tmp_path):
    make("relief")
    pair, _ = read_pairs(tmp_path / "data/mine")
    assert pair.name == "relief_test_000>relief_test_000_moved" and pair.tolerance is None
    assert 300 < len(pair.points) < 32**2 and (pair.points > 0).all() and (pair.points < 224).all()


@pytest.mark.parametrize("seed", [0, 4])
def test_points_of_two_views_are_where_depth_and_pose_say_and_the_hidden_ones_are_left_out(seed):
    """By the depth files of both views and a rotation matrix, without the code that made the points."""
    room, first = relief.furnished(np.random.default_rng(seed))
    second = first.moved(np.random.default_rng(100 + seed))
    here, there = (room.seen_from(camera, np.random.default_rng(0), 448).depth / 1000 for camera in (first, second))
    points, focal = room.shared_points(first, second, 448), 224 / np.tan(np.radians(30))

    def axes(camera):
        """Rows: right, down and ahead of the camera, in the world."""
        (cy, sy), (cp, sp) = ((np.cos(a), np.sin(a)) for a in (camera.yaw, camera.pitch))
        return np.array([[cy, 0, -sy], [-sp * sy, -cp, -sp * cy], [cp * sy, -sp, cp * cy]])

    across = (np.arange(32) * 14 + 7).astype(int)
    kept = {(x, y): (u, v) for x, y, u, v in points.tolist()}
    errors, hidden, seen = [], [], []
    for y in across:
        for x in across:
            # the depth of a pixel is that of a place a quarter pixel beside its middle
            ray = np.array([(x + 0.25 - 224) / focal, (y + 0.25 - 224) / focal, 1]) * here[y, x]
            place = axes(second) @ (axes(first).T @ ray + first.origin - second.origin)
            u, v = place[:2] / place[2] * focal + 224
            inside = place[2] > 0 and 1 < u < 447 and 1 < v < 447
            if (x, y) in kept:
                errors.append(np.hypot(*np.subtract(kept[x, y], (u, v))))
                seen.append(abs(there[int(v), int(u)] - place[2])) if inside else None
            elif inside:
                hidden.append(place[2] - there[int(v), int(u)])
    assert len(errors) == len(points) and np.median(errors) < 0.5 and np.mean(np.array(errors) < 2) > 0.97
    assert np.mean(np.array(seen) < 0.05) > 0.97  # the second view has that depth there
    assert hidden and np.mean(np.array(hidden) > 0.05) > 0.9  # and something nearer where it is hidden
