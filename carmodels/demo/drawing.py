"""Draws one car of the built-in data set from coloured polygons.

A car is a side profile with a width. The profile's edges become the surfaces seen from above, in front and
behind, and a pinhole camera shows them in a side or three-quarter view. The class decides the profile, the
pillars and the doors. Colour, size, position, view, light, background, occlusion, blur and noise follow the
same distributions for every class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import ArrayLike

from carmodels.demo.shapes import VARIATION, BodyShape

_IMAGE_SIZE = (160, 120)  # width, height, pixels
_OVERSAMPLING = 2  # images are drawn this many times larger, then averaged
_TUMBLEHOME = 0.17  # share of the width lost between belt line and roof
_SUBPIXEL_BITS = 4  # of the fraction in coordinates for OpenCV
_BGR = tuple[float, ...]  # blue, green, red, 0 to 255


def draw_vehicle(rng: np.random.Generator, shape: BodyShape) -> np.ndarray:
    """A random image of the shape, (120, 160, 3) uint8, BGR."""
    varied = {name: getattr(shape, name) + rng.uniform(-by, by) for name, by in VARIATION.items()}
    shape = replace(shape, **varied)
    image = _draw_background(rng)
    camera = _random_camera(rng, shape)
    _Painter(image, camera, shape, _random_light(rng), _random_paint(rng)).draw()
    _occlude(rng, image)
    return _degrade(rng, image)


@dataclass(frozen=True)
class _Camera:
    yaw: float  # radians; positive if the nose is nearer than the tail
    pitch: float  # radians; positive if seen from above
    distance: float  # metres from the vehicle's centre
    scale: float = 1.0  # pixels a metre, at the centre
    offset: tuple[float, float] = (0.0, 0.0)  # pixels

    def project(self, points: ArrayLike) -> np.ndarray:
        """points (N, 3) in metres (x towards the tail, y towards the camera, z up) -> (N, 2) pixels."""
        x, y, z = np.asarray(points, dtype=float).T
        right = x * np.cos(self.yaw) + y * np.sin(self.yaw)
        near = y * np.cos(self.yaw) - x * np.sin(self.yaw)
        up = z * np.cos(self.pitch) - near * np.sin(self.pitch)
        depth = self.distance - near * np.cos(self.pitch) - z * np.sin(self.pitch)
        return self.scale * (self.distance / depth)[:, None] * np.stack([right, -up], axis=1) + self.offset


def _random_camera(rng: np.random.Generator, shape: BodyShape) -> _Camera:
    """A side or three-quarter view of the whole vehicle, at a random size and position."""
    angle = rng.uniform(0, 12) if rng.random() < 0.5 else rng.uniform(22, 45)
    yaw = np.deg2rad(angle * rng.choice([-1, 1]))
    camera = _Camera(yaw, np.deg2rad(rng.uniform(3, 14)), shape.length * rng.uniform(2.5, 5))
    x, y, z = shape.length / 2, shape.width / 2, shape.height
    bounds = camera.project([(a, b, c) for a in (-x, x) for b in (-y, y) for c in (0, z)])
    low, span = bounds.min(axis=0), np.ptp(bounds, axis=0)
    canvas = np.array(_IMAGE_SIZE) * _OVERSAMPLING
    scale = min(rng.uniform(0.75, 0.97) * canvas[0] / span[0], 0.9 * canvas[1] / span[1])
    left, top = rng.uniform((0, 0.35), 1) * (canvas - scale * span) - scale * low
    return replace(camera, scale=scale, offset=(left, top))


def _random_light(rng: np.random.Generator) -> np.ndarray:
    """Unit vector (x, y, z) towards the light."""
    light = np.array([rng.uniform(-0.6, 0.6), rng.uniform(0.1, 0.8), 1.0])
    return light / np.linalg.norm(light)


def _random_paint(rng: np.random.Generator) -> np.ndarray:
    """A body colour, (3,) BGR. Half of them are greys, as on the road."""
    saturation = rng.choice([rng.uniform(0, 30), rng.uniform(90, 220)])
    return _hsv(rng.uniform(0, 180), saturation, rng.uniform(100, 250))


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    pixel = np.array([[[hue, saturation, value]]], dtype=np.uint8)
    return cv2.cvtColor(pixel, cv2.COLOR_HSV2BGR)[0, 0].astype(float)


def _bgr(color: ArrayLike) -> _BGR:
    """The colour as floats, which OpenCV asks for."""
    return tuple(np.asarray(color, dtype=float).tolist())


_GLASS, _TRIM, _TYRE, _RIM = (44, 36, 30), (34, 32, 32), (30, 28, 28), (150, 150, 150)
_LAMP, _REAR_LAMP, _PLATE = (215, 235, 240), (40, 30, 190), (205, 210, 210)


@dataclass(frozen=True)
class _Painter:
    """Paints a vehicle, far parts first. Points are (x, y, z) in metres.

    A profile is (x, z) in shares of the length and height.
    """

    image: np.ndarray
    camera: _Camera
    shape: BodyShape
    light: np.ndarray
    paint: np.ndarray

    def draw(self) -> None:
        self._ground_shadow()
        self._wheels(-1)
        self._surfaces(self._lower, (self.paint,) * (len(self._lower) - 1))
        if self.shape.bed:
            self._opening(self.shape.deck + 0.015, 0.975, self.shape.tail)
        self._side(self._lower, self.paint)
        self._front_or_rear()
        if self.shape.open_top:
            self._cockpit()
        else:
            self._cabin()
        self._doors()
        if self.shape.cladding:
            foot, top = self._sill, self._sill + 0.1
            self._side([(0.01, foot), (0.005, top), (0.995, top), (0.99, foot)], _TRIM)
        self._wheels(1)

    @property
    def _sill(self) -> float:
        return self.shape.clearance / self.shape.height

    @property
    def _lower(self) -> list[tuple[float, float]]:
        """Profile of the body, from the front bumper's foot over the belt line to the rear bumper's foot."""
        s = self.shape
        front = [(0.015, self._sill), (0.0, 0.6 * s.nose), (0.012, s.nose), (s.cowl, s.belt)]
        boot = [(s.deck, s.belt), (s.deck, s.tail), (0.99, s.tail - 0.01)]
        return [*front, *boot, (1.0, 0.6 * s.tail), (0.985, self._sill)]

    @property
    def _upper(self) -> list[tuple[float, float]]:
        """Profile of the cabin, from the windscreen's foot over the roof to the rear window's foot."""
        s = self.shape
        crown = (0.5 * (s.roof_front + s.roof_rear), 1.0)
        return [(s.cowl, s.belt), (s.roof_front, 0.97), crown, (s.roof_rear, 0.96), (s.deck, s.belt)]

    def _points(self, profile: ArrayLike, side: float, inset: float = 0.0) -> np.ndarray:
        """profile (N, 2) -> (N, 3) points on the near side (1) or far side (-1), `inset` metres inwards."""
        x, z = np.asarray(profile, dtype=float).T
        over_belt = np.clip((z - self.shape.belt) / (1 - self.shape.belt), 0, 1)
        half = 0.5 * self.shape.width * (1 - _TUMBLEHOME * over_belt) - inset
        return np.stack([(x - 0.5) * self.shape.length, side * half, z * self.shape.height], axis=1)

    def _shade(self, color: ArrayLike, normal: ArrayLike) -> _BGR:
        brightness = 0.5 + 0.6 * max(0.0, float(np.dot(normal, self.light)))
        return tuple(np.clip(np.asarray(color) * brightness, 0, 255))

    def _fill(self, points: ArrayLike, color: ArrayLike) -> None:
        cv2.fillPoly(self.image, [self._pixels(points)], _bgr(color), cv2.LINE_AA, _SUBPIXEL_BITS)

    def _line(self, points: ArrayLike, color: ArrayLike, metres: float = 0.025) -> None:
        width = max(1, round(metres * self.camera.scale))
        cv2.polylines(
            self.image, [self._pixels(points)], False, _bgr(color), width, cv2.LINE_AA, _SUBPIXEL_BITS
        )

    def _pixels(self, points: ArrayLike) -> np.ndarray:
        return np.round(self.camera.project(points) * 2**_SUBPIXEL_BITS).astype(np.int32)

    def _surfaces(self, profile: list[tuple[float, float]], colors: Sequence[ArrayLike]) -> None:
        """Paint the surfaces across the vehicle, one for each edge of the profile, that face the camera."""
        near, far = self._points(profile, 1), self._points(profile, -1)
        for i, color in enumerate(colors):
            quad = np.array([near[i], near[i + 1], far[i + 1], far[i]])
            first, second = self.camera.project(quad[2:]) - self.camera.project(quad[:2])  # its diagonals
            if first[0] * second[1] > first[1] * second[0]:
                continue
            along = near[i + 1] - near[i]
            normal = np.array([-along[2], 0, along[0]]) / max(np.hypot(along[0], along[2]), 1e-6)
            self._fill(quad, self._shade(color, normal))

    def _side(self, profile: list[tuple[float, float]], color: ArrayLike) -> None:
        self._fill(self._points(profile, 1), self._shade(color, (0, 1, 0)))

    def _opening(self, front: float, rear: float, z: float) -> None:
        """Paint a dark opening, seen from above."""
        edge = [(front, z), (rear, z)]
        self._fill([*self._points(edge, 1, 0.07), *self._points(edge, -1, 0.07)[::-1]], _TRIM)

    def _ground_shadow(self) -> None:
        corners = [(x, y, 0) for x, y in ((-0.49, 0.5), (0.5, 0.5), (0.5, -0.5), (-0.49, -0.5))]
        self._fill(np.array(corners) * (self.shape.length, self.shape.width, 1), (38, 38, 38))

    def _wheels(self, side: int) -> None:
        turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        circle = np.stack([np.cos(turn), np.zeros_like(turn), np.sin(turn)], axis=1)
        for axle in self.shape.axles:
            x, y = (axle - 0.5) * self.shape.length, side * 0.49 * self.shape.width
            hub = np.array([x, y, self.shape.wheel])
            if side > 0:
                arch = hub + 1.2 * self.shape.wheel * circle
                self._fill(np.maximum(arch, (-np.inf, -np.inf, self.shape.clearance)), _TRIM)
            self._fill(hub + self.shape.wheel * circle, _TYRE)
            if side > 0:
                self._fill(hub + 0.62 * self.shape.wheel * circle, _RIM)

    def _front_or_rear(self) -> None:
        """Lamps, grille and number plate of the end in view, and the lamps' corners on the side."""
        s = self.shape
        nose_in_view = self.camera.yaw > 0
        x, top, lamp = (-0.495, s.nose, _LAMP) if nose_in_view else (0.495, s.tail, _REAR_LAMP)
        for middle, half, low, high, color in (
            (-0.38, 0.1, 0.82, 0.95, lamp),
            (0.38, 0.1, 0.82, 0.95, lamp),
            (0, 0.24, 0.78, 0.92, _TRIM if nose_in_view else self.paint * 0.8),
            (0, 0.13, 0.6, 0.7, _PLATE),
        ):
            edges = ((-half, low), (half, low), (half, high), (-half, high))
            quad = [(x * s.length, (middle + y) * s.width, z * top * s.height) for y, z in edges]
            self._fill(quad, color)
        for left, right, top, color in ((0.008, 0.05, s.nose, _LAMP), (0.955, 0.992, s.tail, _REAR_LAMP)):
            corner = [(left, 0.82 * top), (left, 0.95 * top), (right, 0.95 * top), (right, 0.86 * top)]
            self._fill(self._points(corner, 1), color)

    def _cabin(self) -> None:
        self._surfaces(self._upper, (_GLASS, self.paint, self.paint, _GLASS))
        self._side(self._upper, self.paint)
        for front, rear in zip(self.shape.pillars, self.shape.pillars[1:], strict=False):
            corners = ((front, 0.06), (front, 0.86), (rear, 0.86), (rear, 0.06))
            inset = (0.04, 0.04, -0.04, -0.04)
            glass = [self._on_cabin(t + dt * 0.5, up) for (t, up), dt in zip(corners, inset, strict=True)]
            self._fill(self._points(glass, 1), _GLASS)
        if self.shape.rails:
            rail = [(self.shape.roof_front + 0.03, 1.02), (self.shape.roof_rear - 0.02, 1.02)]
            self._line(self._points(rail, 1), _TRIM, 0.05)

    def _on_cabin(self, along: float, up: float) -> tuple[float, float]:
        """A profile point of the cabin's side: `along` from cowl (0) to deck (1), `up` from belt to roof."""
        s = self.shape
        foot = s.cowl + along * (s.deck - s.cowl)
        top = s.roof_front + along * (s.roof_rear - s.roof_front)
        return foot + up * (top - foot), s.belt + up * (0.97 - s.belt)

    def _cockpit(self) -> None:
        s = self.shape
        self._opening(s.cowl + 0.02, s.deck - 0.03, s.belt)
        for side in (-0.5, 0.5):
            seat = [(x, s.belt + z) for x, z in ((0, 0), (0.012, 0.16), (0.05, 0.18), (0.06, 0))]
            middle = self._points([(s.roof_front + 0.1 + x, z) for x, z in seat], 1) * (1, side, 1)
            self._fill(middle, (70, 70, 74))
        frame = [(s.cowl, s.belt), (s.roof_front, 0.95)]
        self._line([*self._points(frame, 1), *self._points(frame, -1)[::-1]], _TRIM, 0.06)

    def _doors(self) -> None:
        """Door gaps at the pillars, from the belt down to the sill, and a handle at each door's rear."""
        s = self.shape
        dark = self._shade(self.paint * 0.55, (0, 1, 0))
        for number, pillar in enumerate(s.pillars[: s.doors + 1]):
            x = s.cowl + pillar * (s.deck - s.cowl)
            self._line(self._points([(x, s.belt), (x, self._sill + 0.04)], 1), dark)
            if number:
                handle = [(x - 0.045, s.belt - 0.06), (x - 0.012, s.belt - 0.06)]
                self._line(self._points(handle, 1), dark, 0.05)


def _draw_background(rng: np.random.Generator) -> np.ndarray:
    """Sky above ground, each a colour gradient, with coarse texture and up to four objects."""
    width, height = _IMAGE_SIZE
    horizon = int(height * rng.uniform(0.2, 0.55))
    image = np.empty((height, width, 3))
    for rows in (slice(0, horizon), slice(horizon, height)):
        upper, lower = (_hsv(rng.uniform(0, 180), rng.uniform(0, 80), rng.uniform(60, 250)) for _ in range(2))
        fade = np.linspace(0, 1, image[rows].shape[0])[:, None, None]
        image[rows] = upper + fade * (0.4 * (lower - upper))
    for grain in (6, 24, 80):
        noise = rng.normal(0, rng.uniform(1, 7), (grain * 3 // 4, grain, 1)).astype(np.float32)
        image += cv2.resize(noise, (width, height))[..., None]
    image = np.clip(image, 0, 255).astype(np.uint8)
    for _ in range(rng.integers(0, 5)):
        _draw_object(rng, image, horizon + rng.uniform(-0.05, 0.12) * height, rng.uniform(0.05, 0.4))
    return cv2.resize(image, None, fx=_OVERSAMPLING, fy=_OVERSAMPLING)


def _draw_object(rng: np.random.Generator, image: np.ndarray, foot: float, size: float) -> None:
    """Draw a house, pole or bush with its foot in row `foot`. `size` is a share of the image's height."""
    color = _bgr(_hsv(rng.uniform(0, 180), rng.uniform(0, 160), rng.uniform(40, 230)))
    x, height = int(rng.uniform(0, image.shape[1])), size * image.shape[0]
    kind = rng.integers(3)
    if kind == 2:
        cv2.circle(image, (x, int(foot - height / 2)), int(height / 2), color, -1, cv2.LINE_AA)
    else:
        half = height * (rng.uniform(0.5, 1.5) if kind == 0 else 0.06) / 2
        cv2.rectangle(image, (int(x - half), int(foot - height)), (int(x + half), int(foot)), color, -1)


def _occlude(rng: np.random.Generator, image: np.ndarray) -> None:
    """Draw objects in front of the vehicle in one image of four."""
    height = image.shape[0]
    while rng.random() < 0.25:
        if rng.random() < 0.5:
            x, width = rng.uniform(0, image.shape[1]), rng.uniform(4, 12)
            color = _bgr(_hsv(rng.uniform(0, 180), rng.uniform(0, 80), rng.uniform(30, 220)))
            cv2.rectangle(image, (int(x), 0), (int(x + width), int(height * rng.uniform(0.85, 1))), color, -1)
        else:
            _draw_object(rng, image, height, rng.uniform(0.1, 0.3))


def _degrade(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Mirror half of the images, resize to the final size, add blur, a colour cast and noise."""
    if rng.random() < 0.5:
        image = image[:, ::-1]
    small = cv2.resize(image, _IMAGE_SIZE, interpolation=cv2.INTER_AREA).astype(np.float32)
    if rng.random() < 0.5:
        small = cv2.GaussianBlur(small, (0, 0), rng.uniform(0.3, 0.9)).astype(np.float32)
    lit = small * rng.uniform(0.6, 1.25) * rng.uniform(0.9, 1.1, 3)
    return np.clip(lit + rng.normal(0, rng.uniform(1, 6), small.shape), 0, 255).astype(np.uint8)
