"""Drawn pictures of the procedural clips: each look is a few coloured shapes that move while their source sounds."""

from dataclasses import dataclass

import numpy as np


Colour = tuple[int, int, int]
BLACK, WHITE = (15, 15, 15), (245, 245, 245)


@dataclass(frozen=True)
class Part:
    """One shape of a look, in units of the look's radius, x to the right and y down.

    Args:
        shape (`str`): `"ellipse"`, `"box"` or `"triangle"` (its tip up).
        centre (`tuple[float, float]`): x and y.
        half (`tuple[float, float]`): Half the width and half the height.
        colour (`tuple[int, int, int]`): Red, green and blue, 0 to 255.
    """

    shape: str
    centre: tuple[float, float]
    half: tuple[float, float]
    colour: Colour


@dataclass(frozen=True)
class Look:
    """The shapes of a source and its motion: `"shake"`, `"hop"`, `"pulse"` or `"swing"`."""

    motion: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Place:
    """Centre and radius on the picture, in picture widths."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Actor:
    """A look on the screen.

    Args:
        look (`str`): Key of `LOOKS`.
        place (`Place`): Its position.
        onset (`float`), offset (`float`): Seconds; it moves between the two and stands still outside.
        rate (`float`): Movements per second.
    """

    look: str
    place: Place
    onset: float = 0.0
    offset: float = 0.0
    rate: float = 1.0


def _look(motion: str, *parts: tuple) -> Look:
    return Look(motion, tuple(Part(shape, (x, y), (w, h), colour) for shape, x, y, w, h, colour in parts))


_RED, _BLUE, _CYAN, _ORANGE = (235, 30, 30), (30, 70, 240), (40, 215, 245), (255, 135, 0)
_MAGENTA, _GREEN, _BROWN, _YELLOW = (225, 20, 205), (20, 160, 50), (125, 70, 20), (250, 225, 20)
_PINK, _LIME, _VIOLET, _TAN = (255, 130, 170), (160, 240, 40), (130, 60, 225), (215, 170, 110)
_TEAL, _MINT, _OLIVE, _SKIN = (0, 135, 135), (150, 255, 200), (115, 120, 0), (240, 200, 160)

LOOKS: dict[str, Look] = {
    "car": _look(
        "shake",
        ("box", 0, 0.2, 1, 0.42, _RED),
        ("box", 0, -0.4, 0.55, 0.35, _RED),
        ("ellipse", -0.55, 0.65, 0.25, 0.25, BLACK),
        ("ellipse", 0.55, 0.65, 0.25, 0.25, BLACK),
    ),
    "boat": _look("hop", ("triangle", 0.1, -0.35, 0.6, 0.6, _BLUE), ("box", 0, 0.5, 1, 0.35, _BLUE)),
    "cloud": _look(
        "shake",
        ("ellipse", 0, -0.3, 1, 0.55, _CYAN),
        ("box", -0.6, 0.55, 0.12, 0.4, _CYAN),
        ("box", 0, 0.6, 0.12, 0.4, _CYAN),
        ("box", 0.6, 0.55, 0.12, 0.4, _CYAN),
    ),
    "pan": _look("shake", ("ellipse", -0.2, 0, 0.8, 0.8, _ORANGE), ("box", 0.8, 0, 0.35, 0.13, _ORANGE)),
    "hammer": _look("swing", ("box", 0, -0.55, 0.95, 0.4, _MAGENTA), ("box", 0, 0.4, 0.22, 0.6, _MAGENTA)),
    "door": _look("pulse", ("box", 0, 0, 0.65, 1, _GREEN), ("ellipse", 0.4, 0.1, 0.12, 0.12, BLACK)),
    "sheep": _look(
        "hop",
        ("ellipse", 0.1, 0, 0.9, 0.65, WHITE),
        ("ellipse", -0.75, -0.2, 0.25, 0.3, BLACK),
        ("box", -0.25, 0.75, 0.1, 0.25, BLACK),
        ("box", 0.45, 0.75, 0.1, 0.25, BLACK),
    ),
    "goat": _look(
        "hop",
        ("box", 0.15, 0.1, 0.8, 0.5, _BROWN),
        ("triangle", -0.65, -0.5, 0.3, 0.45, _BROWN),
        ("box", -0.35, 0.8, 0.12, 0.25, _BROWN),
        ("box", 0.65, 0.8, 0.12, 0.25, _BROWN),
    ),
    "bell": _look("swing", ("triangle", 0, -0.1, 0.95, 0.85, _YELLOW), ("ellipse", 0, 0.75, 0.22, 0.22, BLACK)),
    "ambulance": _look(
        "shake",
        ("box", 0, 0, 1, 0.6, _PINK),
        ("box", 0, -0.7, 0.25, 0.15, WHITE),
        ("ellipse", -0.55, 0.65, 0.25, 0.25, BLACK),
        ("ellipse", 0.55, 0.65, 0.25, 0.25, BLACK),
    ),
    "bird": _look(
        "hop",
        ("ellipse", 0.1, 0.2, 0.8, 0.6, _LIME),
        ("ellipse", -0.5, -0.4, 0.4, 0.4, _LIME),
        ("ellipse", -0.55, -0.45, 0.1, 0.1, BLACK),
    ),
    "person": _look("pulse", ("ellipse", 0, -0.55, 0.4, 0.42, _SKIN), ("triangle", 0, 0.4, 0.85, 0.6, _VIOLET)),
    "dog": _look(
        "hop",
        ("box", 0.1, 0.2, 0.75, 0.4, _TAN),
        ("ellipse", -0.6, -0.3, 0.38, 0.38, _TAN),
        ("ellipse", -0.45, -0.35, 0.12, 0.3, BLACK),
        ("box", 0.7, 0.75, 0.12, 0.25, _TAN),
        ("box", -0.45, 0.75, 0.12, 0.25, _TAN),
    ),
    "clock": _look(
        "swing",
        ("ellipse", 0, 0, 0.95, 0.95, _TEAL),
        ("box", 0, -0.35, 0.08, 0.4, WHITE),
        ("box", 0.25, 0, 0.3, 0.08, WHITE),
    ),
    "tree": _look("swing", ("triangle", 0, -0.25, 0.85, 0.75, _MINT), ("box", 0, 0.75, 0.15, 0.25, _MINT)),
    "helicopter": _look(
        "shake",
        ("ellipse", -0.3, 0.2, 0.65, 0.5, _OLIVE),
        ("box", 0.55, 0.1, 0.45, 0.14, _OLIVE),
        ("box", -0.3, -0.55, 0.9, 0.08, _OLIVE),
    ),
}


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    """The approximate distance of a point from a shape at the origin; negative inside."""
    if shape == "ellipse":
        return (np.hypot(x / width, y / height) - 1) * min(width, height)
    if shape == "box":
        return np.maximum(np.abs(x) - width, np.abs(y) - height)
    return np.maximum(np.abs(x) - width * (y + height) / (2 * height), np.abs(y) - height)


def _reach(centre: float, radius: float, size: int) -> slice:
    """The pixels of one axis that a look with this centre and radius can touch while it moves."""
    return slice(max(0, int((centre - 1.4 * radius) * size)), max(0, int((centre + 1.4 * radius) * size) + 1))


def draw(actors: tuple[Actor, ...], times: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draws the picture at given times.

    Args:
        actors (`tuple[Actor, ...]`): The looks on the screen, the nearest last.
        times (`np.ndarray` of shape `(frames,)`): Seconds.
        size (`int`): Width and height in pixels.
        rng (`np.random.Generator`): Chooses the backdrop and the light.

    Returns:
        `np.ndarray` of shape `(frames, size, size, 3)`, uint8.
    """
    times = np.asarray(times, dtype=np.float32)[:, None, None]
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = axis[None, None, :], axis[None, :, None]
    corners = rng.uniform(35, 95, (2, 1)) + rng.uniform(-12, 12, (2, 3))
    light = rng.uniform(0.85, 1.0)
    ramp = axis[:, None, None]
    backdrop = np.broadcast_to((1 - ramp) * corners[0] + ramp * corners[1], (size, size, 3))
    frames = np.repeat(backdrop.astype(np.float32)[None], len(times), axis=0)

    for actor in actors:
        look, place = LOOKS[actor.look], actor.place
        rows, columns = (_reach(centre, place.radius, size) for centre in (place.y, place.x))
        active = np.clip(np.minimum(times - actor.onset, actor.offset - times) / 0.1, 0, 1)
        wave = active * np.sin(2 * np.pi * actor.rate * (times - actor.onset))
        shift_x = 0.15 * wave if look.motion == "shake" else 0
        shift_y = -0.3 * np.abs(wave) if look.motion == "hop" else 0
        scale = place.radius * (1 + 0.2 * wave if look.motion == "pulse" else np.float32(1))
        u, v = (x[..., columns] - place.x) / scale - shift_x, (y[:, rows] - place.y) / scale - shift_y
        if look.motion == "swing":
            cosine, sine = np.cos(0.3 * wave), np.sin(0.3 * wave)
            u, v = cosine * u + sine * v, cosine * v - sine * u
        for part in look.parts:
            distance = _signed_distance(part.shape, u - part.centre[0], v - part.centre[1], *part.half)
            coverage = np.clip(0.5 - distance * place.radius * size, 0, 1)[..., None]
            colour = np.array(part.colour, np.float32) * np.float32(light)
            frames[:, rows, columns] += coverage * (colour - frames[:, rows, columns])
    return (frames + 0.5).astype(np.uint8)
